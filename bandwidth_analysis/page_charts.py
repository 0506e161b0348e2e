"""Charts of the page as SVG: curves with bands, and Pareto fronts; each point says its values."""

import math
from dataclasses import dataclass
from html import escape

import numpy as np

from bandwidth_analysis.groups import Spread
from bandwidth_analysis.palette import COLOURS, GREY, LOG_RATIO
from bandwidth_analysis.pareto import on_front
from bandwidth_analysis.records import Record
from bandwidth_analysis.series import Over, curve, megabytes, rounds, simulated_minutes, spread_of

WIDTH, HEIGHT = 560, 330  # of a chart, in the units of its own coordinates
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 12, 46  # margins
DASHES = ("", "8 4", "2 3")  # each time the colours are used up, the next one begins
NUM_POINTS = 6000  # on the page, in all curves together
LEAST_POINTS, MOST_POINTS = 12, 150  # of a curve


@dataclass(frozen=True)
class Scale:
    """From values to places on a chart, linear or logarithmic."""

    low: float
    high: float
    begin: float  # where the lowest value stands
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = map(self._step, (self.low, self.high, value))
        return self.begin + (self.end - self.begin) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Up to seven or so round values between the lowest and the highest."""
        if self.is_log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1,) if self.high / self.low > 300 else (1, 2, 5)
            values = [step * 10.0**decade for decade in decades for step in steps]
        else:
            rough = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(rough))
            step = power * next(s for s in (1, 2, 5, 10) if s * power >= rough)
            first = math.ceil(self.low / step)
            values = [step * k for k in range(first, math.floor(self.high / step) + 1)]
        return [value for value in values if self.low <= value <= self.high * (1 + 1e-9)]

    def _step(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.is_log else value


def charts(records: list[Record], names: list[str]) -> str:
    """Return all charts as figures; names: of the groups, as in the legend."""
    megabytes_of = [record.mb for record in records]
    minutes_of = [record.simulated_minutes for record in records]
    clock = "Minutes on the simulated clock"
    figures = [
        (
            "Pareto front: accuracy for bytes",
            _front(records, names, megabytes_of, "Up + down (MB)", "{} MB"),
        ),
        (
            "Pareto front: accuracy for time",
            _front(records, names, minutes_of, clock, "{} minutes"),
        ),
        ("Accuracy by round", _curves(records, names, rounds, "Round", "round {}")),
        ("Accuracy by bytes", _curves(records, names, megabytes, "Up + down (MB)", "{} MB")),
        (
            "Accuracy by simulated time",
            _curves(records, names, simulated_minutes, clock, "{} minutes"),
        ),
    ]
    return "".join(
        f"<figure><figcaption>{caption}</figcaption>{chart}</figure>" for caption, chart in figures
    )


def legend(names: list[str]) -> str:
    """Return the names with the line of each."""
    entries = (
        f'<li><svg viewBox="0 0 34 10" width="34" height="10" aria-hidden="true">'
        f'<path d="M0 5H34" {_line(index)}/></svg>{escape(name)}</li>'
        for index, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _curves(records: list[Record], names: list[str], over: Over, label: str, unit: str) -> str:
    """The accuracy of each group as a line, the range over its runs as a band."""
    most = max(LEAST_POINTS, min(MOST_POINTS, NUM_POINTS // (3 * len(records))))
    found = [_thinned(*curve(record.group, over), most) for record in records]
    all_x = np.concatenate([x for x, _ in found])
    if not all_x.size:
        return "<p>No round has been evaluated yet.</p>"
    ends = np.array([x[-1] for x, _ in found if x.size])
    is_log = over is not rounds and spread_of(ends) > LOG_RATIO and all_x.min() > 0
    x_scale = _x_scale(all_x, is_log)
    y_scale = _y_scale(np.concatenate([accuracy.ravel() for _, accuracy in found]))
    shapes = [_axes(x_scale, y_scale, label)]
    for index, (x, accuracy) in enumerate(found):
        middle, low, high = accuracy.mean(axis=0), accuracy.min(axis=0), accuracy.max(axis=0)
        if len(accuracy) > 1 and len(x):
            there = _path(x, high, x_scale, y_scale)
            back = _path(x[::-1], low[::-1], x_scale, y_scale).replace("M", "L")
            shapes.append(f'<path d="{there}{back}Z" fill="{_colour(index)}" opacity=".15"/>')
        shapes.append(f'<path d="{_path(x, middle, x_scale, y_scale)}" {_line(index)}/>')
        for place in range(len(x)):
            values = Spread(tuple(accuracy[:, place].tolist()))
            tip = f"{names[index]}: {_range(values)} % at {unit.format(_show(x[place]))}"
            shapes.append(_point(x_scale(x[place]), y_scale(middle[place]), index, tip, 2.2))
    return _svg(shapes)


def _front(
    records: list[Record], names: list[str], spent: list[Spread], label: str, unit: str
) -> str:
    """Each group as a point with the ranges of its runs; a dashed line joins the front."""
    reached = [record.mean_accuracy.times(100) for record in records]
    points = list(zip(spent, reached, strict=True))
    costs, gains = ([spread.mean for spread in column] for column in zip(*points, strict=True))
    if all(map(math.isnan, gains)):
        return "<p>No round has been evaluated yet.</p>"
    final = [record.final_accuracy for record in records]
    front = sorted(on_front(costs, final), key=costs.__getitem__)
    all_costs = np.array([value for cost, _ in points for value in cost.values])
    x_scale = _x_scale(all_costs, spread_of(np.array(costs)) > LOG_RATIO and all_costs.min() > 0)
    y_scale = _y_scale(np.array([value for _, gain in points for value in gain.values]))
    steps = "".join(
        f"H{x_scale(costs[place]):.1f}V{y_scale(gains[place]):.1f}"
        if step
        else f"M{x_scale(costs[place]):.1f} {y_scale(gains[place]):.1f}"
        for step, place in enumerate(front)
    )
    dashed = f'fill="none" stroke="{GREY}" stroke-dasharray="5 4"'
    shapes = [_axes(x_scale, y_scale, label), f'<path d="{steps}" {dashed}/>']
    for index, (cost, gain) in enumerate(points):
        if math.isnan(gain.mean):
            continue
        x, y, colour = x_scale(cost.mean), y_scale(gain.mean), _colour(index)
        spans = f"M{x_scale(cost.low):.1f} {y:.1f}H{x_scale(cost.high):.1f}"
        spans += f"M{x:.1f} {y_scale(gain.low):.1f}V{y_scale(gain.high):.1f}"
        shapes.append(f'<path d="{spans}" stroke="{colour}" stroke-width="1.5"/>')
        tip = f"{names[index]}: {_range(gain)} % for {unit.format(_range(cost))}"
        shapes.append(_point(x, y, index, tip, 5))
    return _svg(shapes)


# --- parts ----------------------------------------------------------------------------------------


def _thinned(x: np.ndarray, accuracy: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points, evenly spaced, with both ends."""
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), most)).round().astype(int))
    return x[kept], accuracy[:, kept]


def _x_scale(values: np.ndarray, is_log: bool) -> Scale:
    low, high = (values.min() / 1.2, values.max() * 1.2) if is_log else (0, values.max() * 1.05)
    return Scale(float(low), float(high) or 1.0, LEFT, WIDTH - RIGHT, is_log)


def _y_scale(values: np.ndarray) -> Scale:
    """Accuracies (%) with a margin, upwards."""
    values = values[~np.isnan(values)]
    margin = 0.06 * (values.max() - values.min()) or 1
    low, high = max(0.0, values.min() - margin), values.max() + margin
    return Scale(float(low), float(high), HEIGHT - BOTTOM, TOP)


def _axes(x_scale: Scale, y_scale: Scale, label: str) -> str:
    """Grid lines with their values, and the names of both axes."""
    floor = HEIGHT - BOTTOM
    shapes = []
    for value in x_scale.ticks():
        x = f"{x_scale(value):.1f}"
        shapes.append(f'<path class="grid" d="M{x} {TOP}V{floor}"/>')
        shapes.append(f'<text x="{x}" y="{floor + 16}" class="mid">{_show(value)}</text>')
    for value in y_scale.ticks():
        y = y_scale(value)
        shapes.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        shapes.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{_show(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    shapes.append(f'<text x="{middle}" y="{HEIGHT - 8}" class="mid">{escape(label)}</text>')
    upright = f'transform="translate(14 {(TOP + floor) / 2}) rotate(-90)"'
    return "".join(shapes) + f'<text {upright} class="mid">Test accuracy (%)</text>'


def _path(x: np.ndarray, y: np.ndarray, x_scale: Scale, y_scale: Scale) -> str:
    pairs = (f"{x_scale(a):.1f} {y_scale(b):.1f}" for a, b in zip(x, y, strict=True))
    return "M" + "L".join(pairs) if len(x) else ""


def _point(x: float, y: float, index: int, tip: str, radius: float) -> str:
    """A dot inside a larger, invisible one that a finger can find."""
    where = f'cx="{x:.1f}" cy="{y:.1f}"'
    dot = f'<circle {where} r="{radius}" fill="{_colour(index)}"/>'
    return f'<g class="point" data-tip="{escape(tip)}">{dot}<circle {where} r="8" opacity="0"/></g>'


def _svg(shapes: list[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(shapes)}</svg>'


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _line(index: int) -> str:
    """The attributes of the line of the group at `index`."""
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'fill="none" stroke="{_colour(index)}" stroke-width="2"{dashes}'


def _range(values: Spread) -> str:
    low, high = _show(values.low), _show(values.high)
    return low if low == high else f"{_show(values.mean)} ({low} to {high})"


def _show(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
