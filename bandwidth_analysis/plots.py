"""All plots by name, and those of the clients' data: their labels and pictures.

Each function in PLOTS draws one plot as a Figure; drawing.py turns it into a PNG file.
"""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bandwidth_analysis.bars import (
    bytes_by_kind,
    bytes_by_part,
    time_by_phase,
    time_of_a_round,
)
from bandwidth_analysis.curves import (
    accuracy_by_direction,
    accuracy_vs_megabytes,
    accuracy_vs_rounds,
    accuracy_vs_time,
    bytes_per_round,
    density_per_round,
    residual_per_round,
)
from bandwidth_analysis.drawing import alike, count_on, cut, drawable, new_figure, plain
from bandwidth_analysis.front import pareto_front
from bandwidth_analysis.groups import group_runs
from bandwidth_analysis.layers_plot import bytes_by_layer
from bandwidth_analysis.palette import COLOURS, GREY
from bandwidth_analysis.population_plot import population
from bandwidth_analysis.runs import Run
from bandwidth_analysis.timeline_plot import timeline

MAX_NAMED_CLASSES = 20  # If there are more classes, they are numbered.
MAX_CLIENTS_IN_ORDER = 100  # If there are more, a heat map in their order looks like noise.


def labels_per_client(runs: list[Run]) -> Figure:
    """Draw the training pictures by class and client, a heat map for each distinct partition."""
    partitions = alike(runs, _partition)
    num_columns = 1 if len(partitions) <= 3 else 2
    num_rows = -(-len(partitions) // num_columns)
    figure = new_figure(runs, height=0.6 + 2.8 * num_rows)
    for position, (run, labels) in enumerate(partitions, start=1):
        axes = figure.add_subplot(num_rows, num_columns, position)
        _draw_partition(axes, run)
        axes.set_title(plain(f"Labels per client: {', '.join(labels)}", 80 // num_columns))
    return figure


def sample_pictures(runs: list[Run]) -> Figure:
    """Draw pictures of some clients with the clients' labels, a sheet for each distinct set.

    Where a client's label is not the server's, it is coloured and stands before the server's.
    """
    shown = alike(runs, _samples)
    num_rows = [len(np.unique(run.samples.client)) for run, _ in shown]
    figure = new_figure(runs, height=0.5 * len(shown) + 0.93 * sum(num_rows))
    grid = figure.add_gridspec(len(shown), 1, height_ratios=num_rows)
    for position, (run, labels) in enumerate(shown):
        axes = figure.add_subplot(grid[position])
        _draw_samples(axes, run)
        axes.set_title(plain(f"Pictures by client: {', '.join(labels)}", 80))
    return figure


PLOTS = {
    "accuracy_vs_rounds": accuracy_vs_rounds,
    "accuracy_vs_megabytes": accuracy_vs_megabytes,
    "bytes_per_round": bytes_per_round,
    "density_per_round": density_per_round,
    "time_of_a_round": time_of_a_round,
    "labels_per_client": labels_per_client,
}
# By the column of rounds.jsonl that they show, which older runs lack.
PLOTS_OF_COLUMNS = {
    "phase_seconds": ("time_by_phase", time_by_phase),
    "residual_norm": ("residual_per_round", residual_per_round),
    "bytes_by_part": ("bytes_by_part", bytes_by_part),
    "bytes_by_tensor": ("bytes_by_layer", bytes_by_layer),
}
# Each takes a tenth of a second, which would be much at the end of each of many small runs.
PLOTS_OF_SEVERAL_RUNS = {
    "accuracy_by_direction": accuracy_by_direction,
    "accuracy_vs_time": accuracy_vs_time,
    "bytes_by_kind": bytes_by_kind,
}


def plots_of(runs: list[Run]) -> dict[str, Callable[[list[Run]], Figure]]:
    """Return PLOTS and those plots for which the runs hold what they show."""
    more: dict[str, Callable[[list[Run]], Figure]] = {}
    if len(runs) > 1:
        more |= PLOTS_OF_SEVERAL_RUNS
    for column, (name, draw) in PLOTS_OF_COLUMNS.items():
        if any(row[column] for run in runs for row in run.rows):
            more[name] = draw
    if len(group_runs(runs)) > 1:
        more["pareto_front"] = pareto_front
    if any(run.samples for run in runs):
        more["sample_pictures"] = sample_pictures
    if any(run.population for run in runs):
        more["population"] = population
    if len(runs) == 1 and runs[0].timeline:
        more["timeline"] = timeline
    return PLOTS | more


def _partition(run: Run) -> tuple:
    return run.labels_per_client.shape, run.labels_per_client.tobytes(), *run.class_names


def _samples(run: Run) -> tuple | None:
    if run.samples is None:
        return None
    return tuple(array.tobytes() for array in vars(run.samples).values()) + _partition(run)


def _draw_partition(axes: Axes, run: Run) -> None:
    """Draw the heat map of one partition, a row for each class and a column for each client.

    A class of which a client has no picture stays white. If there are more clients than pixels,
    evenly spaced ones are drawn.
    """
    counts = run.labels_per_client
    num_clients, num_classes = counts.shape
    order = "as numbered"
    if num_clients > MAX_CLIENTS_IN_ORDER:
        counts = counts[np.lexsort((-counts.max(axis=1), counts.argmax(axis=1)))]
        order = "sorted by commonest class"
    image = axes.imshow(
        np.ma.masked_equal(counts.T, 0),
        aspect="auto",
        cmap="YlGnBu",
        vmin=0,
        interpolation="nearest",  # the default would blend neighbouring classes
    )
    axes.figure.colorbar(image, ax=axes, label="Pictures", pad=0.02)
    axes.grid(False)
    axes.set(xlabel=f"Client ({num_clients:,} in all, {order})", ylabel="Class")
    count_on(axes.xaxis)
    if num_classes <= MAX_NAMED_CLASSES:
        names = [cut(drawable(name), 16) for name in run.class_names]
        axes.set_yticks(range(num_classes), names)
    else:
        count_on(axes.yaxis)


def _draw_samples(axes: Axes, run: Run) -> None:
    """Draw the sample pictures of one run, a row for each client."""
    samples = run.samples
    clients, rows = np.unique(samples.client, return_inverse=True)
    columns = np.arange(len(rows)) - np.searchsorted(rows, rows)  # those of a client are neighbours
    names = [cut(drawable(name), 10) for name in run.class_names]
    for image, row, column, label, kind in zip(
        samples.images, rows, columns, samples.labels, samples.classes, strict=True
    ):
        extent = (column - 0.38, column + 0.38, row + 0.38, row - 0.38)
        axes.imshow(image, extent=extent, interpolation="nearest")
        is_own = label != kind
        text = f"{names[label]} ({names[kind]})" if is_own else names[label]
        colour = COLOURS[1] if is_own else GREY
        axes.text(column, row + 0.42, text, ha="center", va="top", fontsize=6.5, color=colour)
    sizes = run.labels_per_client[clients].sum(axis=1)
    labels = [f"{client}\n({size:,})" for client, size in zip(clients, sizes, strict=True)]
    axes.set_yticks(range(len(clients)), labels)
    is_any_own = (samples.labels != samples.classes).any()
    note = "Coloured: the client's label (and the server's)" if is_any_own else ""
    axes.set(xticks=[], xlabel=note, ylabel="Client (and its pictures)")
    axes.set(xlim=(-0.5, columns.max() + 0.5), ylim=(len(clients) - 0.35, -0.5), aspect="equal")
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
