"""Draw the plots: accuracy by round and by megabyte, bytes per round, clients' labels and pictures.

Each function in PLOTS draws one plot as a Figure; drawing.py turns it into a PNG file.
"""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter

from bandwidth_analysis.drawing import (
    COLOURS,
    GREY,
    LEGEND_CHARACTERS,
    alike,
    count_on,
    cut,
    drawable,
    new_figure,
    plain,
    scale,
)
from bandwidth_analysis.population_plot import population
from bandwidth_analysis.runs import Run, run_labels
from bandwidth_analysis.timeline_plot import timeline

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "-.", ":")  # each time the colours are used up, the next style begins
REFERENCE_LINE = {"linestyle": "--", "linewidth": 1.3}
MAX_MARKED = 30  # A line of more points than this has no markers.
MAX_NAMED_CLASSES = 20  # If there are more classes, they are numbered.
MAX_CLIENTS_IN_ORDER = 100  # If there are more, a heat map in their order looks like noise.


def accuracy_vs_rounds(runs: list[Run]) -> Figure:
    """Draw the test accuracy (%) over the rounds, a line for each run."""
    figure = new_figure(runs, height=4.2)
    axes = figure.add_subplot()
    lines = []
    for index, run in enumerate(runs):
        evaluated = _evaluated(run)
        style = _line_style(index, len(evaluated))
        lines += axes.plot(evaluated + 1, 100 * run.accuracy[evaluated], **style)
    axes.set(title=_title("Test accuracy", runs), xlabel="Round", ylabel="Test accuracy (%)")
    count_on(axes.xaxis)
    _say_if_empty(axes, lines, "no round evaluated yet")
    _add_legend(figure, runs, lines)
    return figure


def accuracy_vs_megabytes(runs: list[Run]) -> Figure:
    """Draw the test accuracy (%) over the megabytes sent in both directions, a line for each run.

    A dashed vertical line shows how much a run would have sent as float32.
    """
    figure = new_figure(runs, height=4.2)
    axes = figure.add_subplot()
    dense = [(run.total("dense_bytes_up") + run.total("dense_bytes_down")) / 1e6 for run in runs]
    for megabytes, colour in zip(dense, _reference_colours(dense), strict=True):
        if megabytes > 0:
            axes.axvline(megabytes, color=colour, **REFERENCE_LINE)
    lines = []
    for index, run in enumerate(runs):
        evaluated = _evaluated(run)
        sent = np.cumsum(run.traffic["bytes_up"] + run.traffic["bytes_down"])[evaluated] / 1e6
        style = _line_style(index, len(evaluated))
        lines += axes.plot(sent, 100 * run.accuracy[evaluated], **style)
    axes.set(
        title=_title("Test accuracy by volume sent", runs),
        xlabel="Sent so far, up + down (MB)",
        ylabel="Test accuracy (%)",
    )
    ends = [(run.total("bytes_up") + run.total("bytes_down")) / 1e6 for run in runs]
    scale(axes.xaxis, np.array(ends + dense), FuncFormatter(lambda tick, _: f"{tick:,.10g}"))
    _say_if_empty(axes, lines, "no round evaluated yet")
    _add_legend(figure, runs, lines, dashed="end of the run, if sent as float32")
    return figure


def bytes_per_round(runs: list[Run]) -> Figure:
    """Draw the bytes of each round, a panel for each direction and a line for each run.

    Dashed lines show the bytes of the same messages as float32.
    """
    figure = new_figure(runs, height=3.8)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, direction in zip(panels, ("up", "down"), strict=True):
        dense = [run.traffic[f"dense_bytes_{direction}"] for run in runs]
        for volume, colour in zip(dense, _reference_colours(dense), strict=True):
            # A run of one round has no line to show, so a dash marks its point.
            marker = "_" if len(volume) == 1 else ""
            style = {"color": colour, "marker": marker, "markersize": 20, **REFERENCE_LINE}
            axes.plot(_rounds(volume), volume, **style)
        lines = []
        for index, run in enumerate(runs):
            sent = run.traffic[f"bytes_{direction}"]
            lines += axes.plot(_rounds(sent), sent, **_line_style(index, len(sent)))
        axes.set(title=_title(f"Bytes {direction}", runs, width=42), xlabel="Round")
        count_on(axes.xaxis)
        _say_if_empty(axes, lines, "no round completed yet")
    panels[0].set_ylabel("Bytes per round, all clients")
    volumes = np.concatenate([volume for run in runs for volume in run.traffic.values()])
    scale(panels[0].yaxis, volumes, EngFormatter(unit="B"))
    _add_legend(figure, runs, lines, dashed="same messages as float32")
    return figure


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
    "labels_per_client": labels_per_client,
}


def plots_of(runs: list[Run]) -> dict[str, Callable[[list[Run]], Figure]]:
    """Return PLOTS and those plots for which the runs hold what they show."""
    more: dict[str, Callable[[list[Run]], Figure]] = {}
    if any(run.samples for run in runs):
        more["sample_pictures"] = sample_pictures
    if any(run.population for run in runs):
        more["population"] = population
    if len(runs) == 1 and runs[0].timeline:
        more["timeline"] = timeline
    return PLOTS | more


def _title(what: str, runs: list[Run], width: int = 80) -> str:
    """Return a title that names the model and the data set if all runs share them."""
    subjects = {f"{run.model} on {run.dataset}" for run in runs}
    return plain(f"{what}: {subjects.pop()}" if len(subjects) == 1 else what, width)


def _line_style(index: int, num_points: int) -> dict:
    """Return the style of the line of the run at `index` in the list."""
    again, which = divmod(index, len(COLOURS))
    return {
        "color": COLOURS[which],
        "linestyle": LINE_STYLES[again % len(LINE_STYLES)],
        "marker": MARKERS[which] if num_points <= MAX_MARKED else "",
        "linewidth": 1.8,
    }


def _reference_colours(references: list) -> list[str]:
    """Return a colour for each run's reference line.

    It is grey if there is one run or if other runs have the same reference, else the run's colour.
    """
    return [
        GREY
        if len(references) == 1 or sum(np.array_equal(reference, other) for other in references) > 1
        else COLOURS[index % len(COLOURS)]
        for index, reference in enumerate(references)
    ]


def _add_legend(figure: Figure, runs: list[Run], lines: list[Line2D], dashed: str = "") -> None:
    """Name the runs under the plots, and say what dashed lines are."""
    labels = [
        plain(label if run.finished else f"{label} (unfinished)", width=LEGEND_CHARACTERS)
        for run, label in zip(runs, run_labels(runs), strict=True)
    ]
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


def _evaluated(run: Run) -> np.ndarray:
    """Return the indices, from 0, of the rounds that were evaluated."""
    return np.flatnonzero(~np.isnan(run.accuracy))


def _rounds(per_round: np.ndarray) -> np.ndarray:
    return np.arange(1, len(per_round) + 1)


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
