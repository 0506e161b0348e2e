"""Draw curves over rounds, megabytes and time: a line for each group of runs.

Where a group has several seeds, its line is their mean, and a band reaches from the least to the
most of them.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from bandwidth_analysis.drawing import (
    LEGEND_CHARACTERS,
    LEGEND_WIDTH,
    PLAIN_NUMBER,
    count_on,
    new_figure,
    plain,
    scale,
    title,
)
from bandwidth_analysis.groups import Group, group_names, group_runs
from bandwidth_analysis.palette import COLOURS, GREY
from bandwidth_analysis.runs import Run
from bandwidth_analysis.series import (
    Over,
    curve,
    megabytes,
    megabytes_down,
    megabytes_up,
    rounds,
    simulated_minutes,
    wall_minutes,
)

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "-.", ":")  # each time the colours are used up, the next style begins
REFERENCE_LINE = {"linestyle": "--", "linewidth": 1.3}
MAX_MARKED = 30  # A line of more points than this has no markers.
BAND = {"alpha": 0.2, "linewidth": 0}


def accuracy_vs_rounds(runs: list[Run]) -> Figure:
    """Draw the test accuracy (%) over the rounds."""
    figure = new_figure(runs, height=4.2)
    axes = figure.add_subplot()
    lines = _accuracies(axes, runs, rounds)
    axes.set(title=title("Test accuracy", runs), xlabel="Round", ylabel="Test accuracy (%)")
    count_on(axes.xaxis)
    add_legend(figure, runs, lines)
    return figure


def accuracy_vs_megabytes(runs: list[Run]) -> Figure:
    """Draw the test accuracy (%) over the megabytes sent in both directions.

    A dashed vertical line shows how much a group's runs would have sent as float32.
    """
    figure = new_figure(runs, height=4.2)
    axes = figure.add_subplot()
    groups = group_runs(runs)
    dense = [
        float(np.mean([r.total("dense_bytes_up") + r.total("dense_bytes_down") for r in g.runs]))
        / 1e6
        for g in groups
    ]
    for volume, colour in zip(dense, _reference_colours(dense), strict=True):
        if volume > 0:
            axes.axvline(volume, color=colour, **REFERENCE_LINE)
    lines = _accuracies(axes, runs, megabytes)
    axes.set(
        title=title("Test accuracy by volume sent", runs),
        xlabel="Sent so far, up + down (MB)",
        ylabel="Test accuracy (%)",
    )
    _scale_to(axes.xaxis, runs, megabytes, dense)
    add_legend(figure, runs, lines, dashed="end of the run, if sent as float32")
    return figure


def accuracy_by_direction(runs: list[Run]) -> Figure:
    """Draw the test accuracy (%) over the megabytes sent up, and over those sent down."""
    up = (megabytes_up, "Accuracy by bytes up", "Sent up so far (MB)")
    down = (megabytes_down, "Accuracy by bytes down", "Sent down so far (MB)")
    return _two_panels(runs, up, down)


def accuracy_vs_time(runs: list[Run]) -> Figure:
    """Draw the test accuracy (%) over simulated time, and over the time of this machine."""
    simulated = (simulated_minutes, "Accuracy by simulated time", "Minutes on the simulated clock")
    wall = (wall_minutes, "Accuracy by wall time", "Minutes that this machine trained")
    return _two_panels(runs, simulated, wall)


def bytes_per_round(runs: list[Run]) -> Figure:
    """Draw the bytes of each round, a panel for each direction.

    Dashed lines show the bytes of the same messages as float32.
    """
    figure = new_figure(runs, height=3.8)
    panels = figure.subplots(1, 2, sharey=True)
    groups = group_runs(runs)
    for axes, direction in zip(panels, ("up", "down"), strict=True):
        dense = [_mean_of(g, lambda r, d=direction: r.traffic[f"dense_bytes_{d}"]) for g in groups]
        for volume, colour in zip(dense, _reference_colours(dense), strict=True):
            # A run of one round has no line to show, so a dash marks its point.
            marker = "_" if len(volume) == 1 else ""
            style = {"color": colour, "marker": marker, "markersize": 20, **REFERENCE_LINE}
            axes.plot(np.arange(1, len(volume) + 1), volume, **style)
        lines = _per_round(axes, groups, lambda r, d=direction: r.traffic[f"bytes_{d}"])
        axes.set(title=title(f"Bytes {direction}", runs, width=42), xlabel="Round")
        _say_if_empty(axes, lines, "no round completed yet")
    panels[0].set_ylabel("Bytes per round, all clients")
    volumes = np.concatenate([volume for run in runs for volume in run.traffic.values()])
    scale(panels[0].yaxis, volumes, EngFormatter(unit="B"))
    add_legend(figure, runs, lines, dashed="same messages as float32")
    return figure


def density_per_round(runs: list[Run]) -> Figure:
    """Draw which share of an update's values travels up, and in how many bits each."""
    figure = new_figure(runs, height=3.8)
    panels = figure.subplots(1, 2)
    groups = group_runs(runs)
    shares, bits = panels
    _draw_shares(shares, runs)
    lines = _per_round(bits, groups, lambda run: run.bits_per_value_up)
    bits.set(title=title("Bits per value", runs, width=42), xlabel="Round", ylim=(0, None))
    bits.set_ylabel("Bits, positions included")
    for axes in panels:
        _say_if_empty(axes, lines, "no round completed yet")
    add_legend(figure, runs, lines)
    return figure


def residual_per_round(runs: list[Run]) -> Figure:
    """Draw which share of an update's values travels up, and how much the clients owe besides."""
    figure = new_figure(runs, height=3.8)
    shares, owed = figure.subplots(1, 2)
    _draw_shares(shares, runs)
    lines = _per_round(owed, group_runs(runs), lambda run: run.per_round("residual_norm"))
    owed.set(title=title("What a client owes", runs, width=42), xlabel="Round")
    owed.set_ylabel("L2 norm of the residual")
    norms = np.concatenate([run.per_round("residual_norm") for run in runs])
    scale(owed.yaxis, norms, PLAIN_NUMBER)
    add_legend(figure, runs, lines)
    return figure


def _draw_shares(axes: Axes, runs: list[Run]) -> None:
    """Draw which share of an update's values travels up."""
    _per_round(axes, group_runs(runs), lambda run: 100 * run.density_up)
    axes.set(title=title("Values sent up", runs, width=42), xlabel="Round")
    axes.set_ylabel("Share of all values (%)")
    scale(axes.yaxis, np.concatenate([100 * r.density_up for r in runs]), PLAIN_NUMBER)


# --- lines and bands ------------------------------------------------------------------------------


def _accuracies(axes: Axes, runs: list[Run], over: Over) -> list[Line2D]:
    lines = []
    for index, group in enumerate(group_runs(runs)):
        x, accuracy = curve(group, over)
        lines.append(_draw(axes, index, x, accuracy))
    _say_if_empty(axes, lines, "no round evaluated yet")
    return lines


def _per_round(axes: Axes, groups: list[Group], values: Over) -> list[Line2D]:
    lines = []
    for index, group in enumerate(groups):
        length = min(run.num_rounds for run in group.runs)
        each = np.array([values(run)[:length] for run in group.runs])
        lines.append(_draw(axes, index, np.arange(1, length + 1), each))
    count_on(axes.xaxis)
    return lines


def _draw(axes: Axes, index: int, x: np.ndarray, values: np.ndarray) -> Line2D:
    """Draw the mean of values [num_runs, len(x)] as a line, and their range as a band."""
    style = line_style(index, len(x))
    if len(values) > 1:
        axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=style["color"], **BAND)
    [line] = axes.plot(x, values.mean(axis=0), **style)
    return line


def _mean_of(group: Group, values: Over) -> np.ndarray:
    length = min(run.num_rounds for run in group.runs)
    return np.mean([values(run)[:length] for run in group.runs], axis=0)


def line_style(index: int, num_points: int) -> dict:
    """Return the style of the line of the group at `index` in the list."""
    again, which = divmod(index, len(COLOURS))
    return {
        "color": COLOURS[which],
        "linestyle": LINE_STYLES[again % len(LINE_STYLES)],
        "marker": MARKERS[which] if num_points <= MAX_MARKED else "",
        "linewidth": 1.8,
    }


# --- what stands around them ----------------------------------------------------------------------


def _two_panels(runs: list[Run], *panels: tuple[Over, str, str]) -> Figure:
    """Draw the test accuracy (%) over two things, each with a title and a label."""
    figure = new_figure(runs, height=3.8)
    for axes, panel in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        over, what, label = panel
        lines = _accuracies(axes, runs, over)
        axes.set(title=title(what, runs, width=42), xlabel=label)
        _scale_to(axes.xaxis, runs, over, [])
    figure.axes[0].set_ylabel("Test accuracy (%)")
    add_legend(figure, runs, lines)
    return figure


def _scale_to(axis: Axis, runs: list[Run], over: Over, more: list[float]) -> None:
    """Make the axis logarithmic if the runs' ends differ widely."""
    ends = [over(run)[-1] if run.num_rounds else 0.0 for run in runs]
    begins = [over(run)[0] for run in runs if run.num_rounds]
    scale(axis, np.array(ends + more), PLAIN_NUMBER, drawn=np.array(begins + ends + more))


def _reference_colours(references: list) -> list[str]:
    """Return a colour for each group's reference line.

    It is grey if there is one group or if others have the same reference, else the group's colour.
    """
    return [
        GREY
        if len(references) == 1 or sum(np.array_equal(reference, other) for other in references) > 1
        else COLOURS[index % len(COLOURS)]
        for index, reference in enumerate(references)
    ]


def add_legend(figure: Figure, runs: list[Run], lines: list[Line2D], dashed: str = "") -> None:
    """Name the groups under the plots, and say what dashed lines are."""
    labels = [plain(name, width=LEGEND_WIDTH) for name in group_names(runs)]
    if dashed:
        labels.append(dashed)
        lines = [*lines, Line2D([], [], color=GREY, **REFERENCE_LINE)]
    num_columns = max(1, min(len(labels), LEGEND_CHARACTERS // (max(map(len, labels)) + 8)))
    figure.legend(lines, labels, loc="outside lower center", ncols=num_columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(labels) // num_columns))


def _say_if_empty(axes: Axes, lines: list[Line2D], reason: str) -> None:
    """Write the reason into a plot without points, and remove its meaningless ticks."""
    if not any(len(line.get_xdata()) for line in lines):
        axes.text(0.5, 0.5, reason, ha="center", va="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
