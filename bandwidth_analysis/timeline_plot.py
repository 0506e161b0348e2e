"""Draw what each client did in a round."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from bandwidth_analysis.drawing import cut, drawable, new_figure, plain
from bandwidth_analysis.palette import COLOURS
from bandwidth_analysis.runs import Run, run_labels

MAX_CLIENTS = 40  # More bars than this are too thin to read.
FACES = {
    "download": COLOURS[5],
    "compute": COLOURS[4],
    "upload": COLOURS[2],
    "idle": "#E6E6E6",
    "unknown": "white",
}
LOST = {"edgecolor": "black", "hatch": "xxxx", "linewidth": 0.5}


def timeline(runs: list[Run]) -> Figure:
    """Draw a round of the first run: a bar for each client, in the order in which they were done.

    At most MAX_CLIENTS clients are drawn, evenly spaced in that order.
    """
    run = runs[0]
    clients = list(run.timeline.clients)
    shown = [clients[place] for place in _spread(len(clients), MAX_CLIENTS)]
    figure = new_figure([run], height=1.6 + 0.17 * max(6, len(shown)))
    axes = figure.add_subplot()
    for place, client in enumerate(shown):
        for segment in run.timeline.clients[client]:
            look = {"facecolor": FACES[segment.state], **(LOST if segment.is_lost else {})}
            axes.barh(place, segment.end - segment.start, left=segment.start, **look)
    name = run_labels([run])[0]
    axes.set_title(plain(f"Round {run.timeline.round_number} of {name}: who did what, when", 80))
    axes.set(xlabel=_what_is_shown(len(shown), len(clients)), ylabel="Client, first done first")
    axes.set_yticks(range(len(shown)), [_name(run, client) for client in shown], fontsize=7.5)
    axes.set(xlim=(0, run.timeline.seconds or 1), ylim=(max(len(shown), 1) - 0.4, -0.6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.10g}"))
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    handles = [Patch(label=state, facecolor=face) for state, face in FACES.items()]
    handles[-1] = Patch(label="late (cut off) or failed", facecolor="white", **LOST)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _spread(count: int, at_most: int) -> list[int]:
    """Up to `at_most` of the places from 0 to count - 1, evenly spaced, with both ends."""
    return np.linspace(0, count - 1, min(count, at_most)).round().astype(int).tolist()


def _what_is_shown(num_shown: int, num_clients: int) -> str:
    text = "Simulated time since the round began (s)"
    if num_shown == num_clients:
        return text
    return (
        f"{text}\nLeft out: {num_clients - num_shown:,} of the {num_clients:,} clients, evenly in "
        f"this order; the first and the last one are shown"
    )


def _name(run: Run, client: str) -> str:
    """The client's number with its profiles, where it has any."""
    if run.population is None or not client.isdecimal():
        return cut(drawable(client), 16)
    profiles = (run.population.link[int(client)], run.population.device[int(client)])
    known = [cut(drawable(str(name)), 12) for name in profiles if name != "constant"]
    return f"{', '.join(known)}  {client}" if known else client
