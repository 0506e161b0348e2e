"""Which groups of runs no other group beats: more accuracy costs more bytes, or more time."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bandwidth_analysis.curves import REFERENCE_LINE, add_legend, line_style
from bandwidth_analysis.drawing import PLAIN_NUMBER, new_figure, scale, title
from bandwidth_analysis.groups import Spread, group_runs
from bandwidth_analysis.palette import COLOURS, GREY
from bandwidth_analysis.pareto import on_front
from bandwidth_analysis.records import Record, make_records
from bandwidth_analysis.runs import Run

FILLS = ("full", "none", "left")


def pareto_front(runs: list[Run]) -> Figure:
    """Draw each group as a point, accuracy (%) over megabytes and over simulated time.

    Bars reach from the least to the most of its seeds. A grey line joins the groups of the front,
    those for which no other is at least as accurate for less.
    """
    figure = new_figure(runs, height=4.2)
    records = make_records(group_runs(runs))
    bytes_axes, time_axes = figure.subplots(1, 2, sharey=True)
    points = _draw(bytes_axes, records, [record.mb for record in records])
    bytes_axes.set(title=title("Accuracy for bytes", runs, width=42), xlabel="Up + down (MB)")
    bytes_axes.set_ylabel("Test accuracy, mean of the last k (%)")
    _draw(time_axes, records, [record.simulated_minutes for record in records])
    time_axes.set(title=title("Accuracy for time", runs, width=42), xlabel="Simulated minutes")
    add_legend(figure, runs, points, dashed="front: no other run is better for less")
    return figure


def _draw(axes: Axes, records: list[Record], costs: list[Spread]) -> list[Line2D]:
    gains = [record.mean_accuracy.times(100) for record in records]
    front = on_front([cost.mean for cost in costs], [record.final_accuracy for record in records])
    front.sort(key=lambda place: costs[place].mean)
    corners = [(costs[place].mean, gains[place].mean) for place in front]
    if corners:
        axes.step(*zip(*corners, strict=True), where="post", color=GREY, **REFERENCE_LINE)
    points = []
    for index, (cost, gain) in enumerate(zip(costs, gains, strict=True)):
        style = line_style(index, 1) | {"linestyle": "none", "markersize": 7}
        style["fillstyle"] = FILLS[index // len(COLOURS) % len(FILLS)]  # the colours come again
        points += axes.plot([cost.mean], [gain.mean], **style)
        spans = {"color": style["color"], "linewidth": 1.3}
        axes.plot([cost.mean] * 2, [gain.low, gain.high], **spans)
        axes.plot([cost.low, cost.high], [gain.mean] * 2, **spans)
    scale(axes.xaxis, np.array([cost.mean for cost in costs]), PLAIN_NUMBER)
    return points
