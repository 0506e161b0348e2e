"""Draw which layers the bytes of an update belong to."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from bandwidth_analysis import breakdown
from bandwidth_analysis.curves import add_legend, line_style
from bandwidth_analysis.drawing import cut, drawable, new_figure, scale, title
from bandwidth_analysis.groups import group_runs
from bandwidth_analysis.palette import COLOURS
from bandwidth_analysis.runs import Run

MAX_LAYERS = 45  # More rows than this are merged.
LABEL = "Bytes of one client's update, mean over the evaluated rounds"
BYTES = EngFormatter(unit="B")


def bytes_by_layer(runs: list[Run]) -> Figure:
    """Draw the bytes of each layer in a client's update, the network's first layer on top.

    A single group of runs has bars, several have points. Each network has axes of its own.
    """
    groups = group_runs(runs)
    networks: dict[tuple[str, ...], dict[int, list[float]]] = {}  # layers: by group their bytes
    for index, group in enumerate(groups):
        if layers := breakdown.bytes_by_layer(group.runs, MAX_LAYERS):
            networks.setdefault(tuple(layers), {})[index] = list(layers.values())
    rows = [max(4, len(layers)) for layers in networks]
    figure = new_figure(runs, height=0.17 * sum(rows) + 1.3 * len(rows))
    panels = figure.subplots(len(rows), squeeze=False, height_ratios=rows)[:, 0]
    for axes, (layers, sizes) in zip(panels, networks.items(), strict=True):
        _draw(axes, sizes, as_bars=len(groups) == 1)
        axes.set_yticks(range(len(layers)), [cut(drawable(n), 30) for n in layers], fontsize=7.5)
        axes.set(ylim=(len(layers) - 0.3, -0.7), xlabel=LABEL)
        axes.tick_params(axis="y", length=0)
    panels[0].set_title(title("Bytes by layer", runs))
    if len(groups) > 1:
        add_legend(figure, runs, [Line2D([], [], **_point(index)) for index in range(len(groups))])
    return figure


def _draw(axes: Axes, sizes: dict[int, list[float]], as_bars: bool) -> None:
    """Draw the bytes of a network's layers; sizes: these bytes, by the index of the group."""
    for index, values in sizes.items():
        places = range(len(values))
        if not as_bars:
            axes.plot(values, places, **_point(index))
            continue
        bars = axes.barh(places, values, color=COLOURS[index], height=0.7)
        axes.bar_label(bars, [short(value) for value in values], padding=3, fontsize=7)
        axes.margins(x=0.1)
        axes.grid(False, axis="y")
    if as_bars:
        axes.xaxis.set_major_formatter(BYTES)
    else:
        scale(axes.xaxis, np.concatenate(list(sizes.values())), BYTES)


def short(num_bytes: float) -> str:
    """Three digits and a unit, such as 1.23 kB."""
    num_bytes = float(f"{num_bytes:.3g}")
    power = max(0, min(3, (len(str(int(num_bytes))) - 1) // 3))
    return f"{num_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"


def _point(index: int) -> dict:
    """The look of the points of the group at `index`."""
    return line_style(index, 1) | {"linestyle": "", "alpha": 0.85}
