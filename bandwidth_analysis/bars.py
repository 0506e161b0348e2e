"""Draw what a group's bytes and a round's time consist of: a bar for each group of runs."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bandwidth_analysis.breakdown import REST, Parts, megabytes_by_part, phase_seconds
from bandwidth_analysis.drawing import PLAIN_NUMBER, cut, drawable, new_figure, title
from bandwidth_analysis.groups import Group, group_names, group_runs
from bandwidth_analysis.palette import COLOURS, GREY
from bandwidth_analysis.records import over_rounds
from bandwidth_analysis.runs import Run

NAME_CHARACTERS = 40  # A longer name of a group is cut off beside its bar.
WAITING = "#E6E6E6"
SHORTEST = 1e-6  # of a round: less is the rounding of times that are equal
WIDE = 9  # percent of a bar: a part that is wider has room for a number
DARK = (COLOURS[0], COLOURS[6], GREY)
# Neighbours differ in brightness, too.
PHASES = {
    "train": COLOURS[4],
    "select": COLOURS[6],
    "encode": COLOURS[5],
    "exchange": COLOURS[0],
    "decode": COLOURS[3],
    "step": COLOURS[2],
    "evaluate": COLOURS[1],
    REST: WAITING,
}
PARTS = {
    "header": COLOURS[6],
    "small tensors": COLOURS[4],
    "positions": COLOURS[0],
    "values": COLOURS[5],
    "positions and values": COLOURS[3],
    "buffers": COLOURS[2],
}


def bytes_by_kind(runs: list[Run]) -> Figure:
    """Draw the megabytes of each kind of message in each direction, means over a group's runs."""
    groups = group_runs(runs)
    kinds = sorted({kind for run in runs for kind in run.bytes_by_kind}, reverse=True)
    parts = {
        f"{kind} {direction}": [_megabytes(group, (direction, kind)) for group in groups]
        for direction, kind in kinds
    }
    colours = [COLOURS[place % len(COLOURS)] for place in range(len(parts))]
    figure = _bars(runs, parts, colours)
    figure.axes[0].set(title=title("Bytes by kind of message", runs), xlabel="Sent by all (MB)")
    return figure


def time_of_a_round(runs: list[Run]) -> Figure:
    """Draw what a client does in a round of the simulated clock: means over clients and rounds.

    A run that does not say how busy its clients were has a bar of one piece.
    """
    groups = group_runs(runs)
    whole = [_seconds(group) for group in groups]
    computes = [_seconds(group, "device_utilisation") for group in groups]
    sends = [_seconds(group, "link_utilisation") for group in groups]
    rest = np.subtract(whole, np.add(computes, sends))
    unknown = [computing == 0 for computing in computes]
    parts = {
        "computes": computes,
        "sends and receives": sends,
        "waits for the round's end": np.where(unknown, 0, np.maximum(rest, 0)),
        "computes or waits": np.where(unknown, np.maximum(rest, 0), 0),
    }
    used = {name: part for name, part in parts.items() if max(part) > SHORTEST * max(whole)}
    colours = dict(zip(parts, (COLOURS[4], COLOURS[0], WAITING, GREY), strict=True))
    figure = _bars(runs, used, [colours[name] for name in used])
    figure.axes[0].set(title=title("A client's round", runs), xlabel="Simulated time (s)")
    return figure


def time_by_phase(runs: list[Run]) -> Figure:
    """Draw what the main rank spends a round's time on, by its own clock."""
    figure = _shares(runs, phase_seconds, PHASES, "s")
    label = "Share of the main rank's wall time, mean over the rounds after the first (%)"
    figure.axes[0].set(title=title("Time of a round by phase", runs), xlabel=label)
    return figure


def bytes_by_part(runs: list[Run]) -> Figure:
    """Draw what the megabytes that went up consist of: parts of the updates, and other kinds."""
    figure = _shares(runs, megabytes_by_part, PARTS, "MB")
    label = "Share of all bytes up (%); updates split as those of one client in evaluated rounds"
    figure.axes[0].set(title=title("Bytes up by part", runs), xlabel=label)
    return figure


def _shares(
    runs: list[Run], parts_of: Callable[[list[Run]], Parts], colours: dict[str, str], unit: str
) -> Figure:
    """Draw a bar of 100 % for each group whose parts are known; numbers are in the unit.

    colours: of the parts, in their order.
    """
    known = [(group.runs, parts) for group in group_runs(runs) if (parts := parts_of(group.runs))]
    each = [parts for _, parts in known]
    totals = [sum(parts.values()) for parts in each]
    shares: dict[str, list[float]] = {}
    for name in dict.fromkeys([*colours, *(name for parts in each for name in parts)]):
        share = [100 * p.get(name, 0.0) / total for p, total in zip(each, totals, strict=True)]
        if max(share, default=0) > 100 * SHORTEST:
            shares[name] = share
    used = [colours.get(name, GREY) for name in shares]
    figure = _bars([run for members, _ in known for run in members], shares, used)
    axes = figure.axes[0]
    for bars, colour, share in zip(axes.containers, used, shares.values(), strict=True):
        numbers = [s * total / 100 for s, total in zip(share, totals, strict=True)]
        texts = [f"{n:.3g}" if s > WIDE else "" for n, s in zip(numbers, share, strict=True)]
        ink = "white" if colour in DARK else "black"
        axes.bar_label(bars, texts, label_type="center", fontsize=8, color=ink)
    for place, total in enumerate(totals):
        axes.text(101, place, f"{total:.3g} {unit}", va="center", fontsize=9)
    axes.set(xlim=(0, 112), xticks=range(0, 101, 20))
    return figure


def _megabytes(group: Group, kind: tuple[str, str]) -> float:
    return float(np.mean([run.bytes_by_kind.get(kind, 0) for run in group.runs])) / 1e6


def _seconds(group: Group, share: str = "") -> float:
    values = over_rounds(group.runs, share).values
    return float(np.mean(values)) if values else 0.0


def _bars(runs: list[Run], parts: dict[str, list], colours: list[str]) -> Figure:
    """Draw a bar for each group, one below the other, its parts side by side."""
    names = [cut(drawable(name), NAME_CHARACTERS) for name in group_names(runs)]
    figure = new_figure(runs, height=3.0 + 0.3 * max(0, len(names) - 4))
    axes = figure.add_subplot()
    left = np.zeros(len(names))
    for (name, sizes), colour in zip(parts.items(), colours, strict=True):
        look = {"color": colour, "edgecolor": "white", "linewidth": 0.5, "height": 0.6}
        axes.barh(range(len(names)), sizes, left=left, label=drawable(name), **look)
        left += sizes
    _set_axes(axes, names)
    if parts:
        figure.legend(loc="outside lower center", ncols=min(4, len(parts)))
    else:
        axes.text(0.5, 0.5, "no round completed yet", ha="center", transform=axes.transAxes)
    return figure


def _set_axes(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 2) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(PLAIN_NUMBER)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
