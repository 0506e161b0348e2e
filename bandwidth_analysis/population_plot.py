"""Draw the links and devices of the clients."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from bandwidth_analysis.drawing import (
    LOG_RATIO,
    alike,
    count_on,
    cut,
    drawable,
    new_figure,
    plain,
    scale,
)
from bandwidth_analysis.palette import COLOURS, GREY
from bandwidth_analysis.runs import Run

PANELS = {  # column: its title, its unit, and the profile that colours it
    "uplink_mbps": ("Uplink bandwidth", "Mbit/s", "link"),
    "downlink_mbps": ("Downlink bandwidth", "Mbit/s", "link"),
    "latency_ms": ("Latency, one way", "ms", "link"),
    "ms_per_example": ("Device: training of an example", "ms", "device"),
}
NO_PROFILE = "constant"  # of clients that have the figures of the config
OTHERS = "others"  # the profiles for which there are no colours left
FEWEST_BINS, MOST_BINS = 10, 40  # of a histogram


def population(runs: list[Run]) -> Figure:
    """Draw a histogram of each of PANELS, four for each distinct population of the runs."""
    shown = alike(runs, _content)
    links = _colours([run for run, _ in shown], "link", COLOURS)
    later = len(links) % len(COLOURS)  # so that devices have other colours, if there are enough
    devices = _colours([run for run, _ in shown], "device", COLOURS[later:] + COLOURS[:later])
    colours = {"link": links, "device": devices}
    figure = new_figure(runs, height=0.4 + 4.8 * len(shown))
    parts = np.atleast_1d(figure.subfigures(len(shown), 1))
    for part, (run, labels) in zip(parts, shown, strict=True):
        count = f"{len(run.population.link):,} clients"
        part.suptitle(plain(f"{count}: {', '.join(labels)}", 80), fontsize=11, fontweight="bold")
        for axes, column in zip(part.subplots(2, 2).flat, PANELS, strict=True):
            _draw_histogram(axes, run, column, colours[PANELS[column][2]])
    handles = [
        Patch(facecolor=colour, label=f"{kind}: {cut(drawable(name), 16)}")
        for kind, by_name in colours.items()
        for name, colour in by_name.items()
        if name != NO_PROFILE
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)))
        figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(handles) // 5))
    return figure


def _content(run: Run) -> tuple | None:
    """What makes two populations the same."""
    if run.population is None:
        return None
    return *run.traced, *(array.tobytes() for array in vars(run.population).values())


def _colours(runs: list[Run], kind: str, colours: Sequence[str]) -> dict[str, str]:
    """A colour for each profile of this kind, link or device; the rarest share one as OTHERS."""
    count = Counter(name for run in runs for name in getattr(run.population, kind).tolist())
    no_profile = {NO_PROFILE: GREY} if count.pop(NO_PROFILE, 0) else {}
    names = [name for name, _ in sorted(count.items(), key=lambda item: (-item[1], item[0]))]
    others = {OTHERS: "#BBBBBB"} if len(names) > len(colours) else {}
    named = zip(sorted(names[: len(colours)]), colours, strict=False)
    return dict(named) | others | no_profile


def _draw_histogram(axes: Axes, run: Run, column: str, colours: dict[str, str]) -> None:
    """Stack the clients of each profile."""
    title, unit, kind = PANELS[column]
    values, names = getattr(run.population, column), getattr(run.population, kind)
    if column in run.traced:
        axes.text(0.5, 0.5, "as in the trace", ha="center", transform=axes.transAxes)
        axes.set(title=title, xticks=[], yticks=[])
        return
    names = np.where(np.isin(names, list(colours)), names, OTHERS)
    groups = [values[names == name] for name in colours]
    axes.hist(groups, bins=_edges(values), stacked=True, color=list(colours.values()), linewidth=0)
    axes.set(title=title, xlabel=f"{unit} (median {np.median(values):.3g})", ylabel="Clients")
    scale(axes.xaxis, values, FuncFormatter(lambda tick, _: f"{tick:,.10g}"))
    axes.tick_params(axis="x", labelsize=8)
    count_on(axes.yaxis)


def _edges(values: np.ndarray) -> np.ndarray:
    """The borders of the bins: as far apart on the axis as they look, see scale()."""
    low, high = values.min(), values.max()
    num_edges = 1 + int(np.clip(np.sqrt(len(values)), FEWEST_BINS, MOST_BINS))
    if low == high:
        return np.linspace(0, 2 * high or 1, num_edges + num_edges % 2)  # one bar in the middle
    if low > 0 and high > LOG_RATIO * low:
        return np.geomspace(low, high, num_edges)
    return np.linspace(low, high, num_edges)
