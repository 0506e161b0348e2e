"""What all plots share: style and size, text that can be drawn, scales, and the PNG file."""

import io
import textwrap
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import Formatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bandwidth_analysis.palette import LOG_RATIO
from bandwidth_analysis.runs import Run, fallback_notes, run_labels
from bandwidth_analysis.series import spread_of

WIDTH = 8.0  # inches, or 1,200 pixels, which a README shows at about two thirds of their size
DPI = 150
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#DDDDDD",
    "legend.frameon": False,
    "lines.markersize": 5,
    "text.parse_math": False,  # dollar signs in names do not enclose formulas
}
NOTE_FRAME = {"facecolor": "#FFF3E0", "edgecolor": "#D55E00", "boxstyle": "round,pad=0.4"}
MAX_LINES = 4  # A longer title or label is cut off.
PLAIN_NUMBER = FuncFormatter(lambda tick, _: f"{tick:,.10g}")
LEGEND_WIDTH = 90  # characters of a line of one entry
LEGEND_CHARACTERS = 105  # This many fit side by side under a plot.


def style() -> AbstractContextManager:
    """Draw in STYLE and, for all other settings, as matplotlib does without a matplotlibrc."""
    return matplotlib.style.context(STYLE, after_reset=True)


def render(draw: Callable[[list[Run]], Figure], runs: list[Run]) -> bytes:
    """Draw one plot of the runs; return it as a PNG file."""
    png = io.BytesIO()
    with style(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as: the layout is too tight
        FigureCanvasAgg(draw(runs)).print_png(png)
    return png.getvalue()


def new_figure(runs: list[Run], height: float) -> Figure:
    """Make an empty figure of `height` inches; fallback notes, if there are any, stand above it."""
    notes = "\n".join(plain(note, width=112) for note in fallback_notes(runs))
    height += 0.2 * (notes.count("\n") + 2) if notes else 0
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    if notes:
        figure.suptitle(notes, fontsize=9.5, bbox=NOTE_FRAME)
    return figure


def alike(runs: list[Run], content: Callable[[Run], Any]) -> list[tuple[Run, list[str]]]:
    """Return for each distinct content a run that has it, and the labels of all such runs.

    Runs whose content is None are left out.
    """
    found: dict[Any, tuple[Run, list[str]]] = {}
    for run, label in zip(runs, run_labels(runs), strict=True):
        if (key := content(run)) is not None:
            found.setdefault(key, (run, []))[1].append(label)
    return list(found.values())


def title(what: str, runs: list[Run], width: int = 80) -> str:
    """Return a title that names the model and the data set if all runs share them."""
    subjects = {f"{run.model} on {run.dataset}" for run in runs}
    return plain(f"{what}: {subjects.pop()}" if len(subjects) == 1 else what, width)


def plain(text: str, width: int) -> str:
    """Return the text as it can be drawn, in about MAX_LINES lines of `width` characters."""
    return textwrap.fill(cut(drawable(text), MAX_LINES * width), width)


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def drawable(text: str) -> str:
    """Escape the characters that the font does not have, such as emoji."""
    return "".join(
        character
        if character.isprintable() and ord(character) in _characters_of_font()
        else character.encode("unicode_escape").decode()
        for character in text
    )


@cache
def _characters_of_font() -> set[int]:
    return set(get_font(findfont("DejaVu Sans")).get_charmap())


def count_on(axis: Axis) -> None:
    """Set ticks at whole numbers only, even if there is just one."""
    axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def scale(
    axis: Axis, values: np.ndarray, formatter: Formatter, drawn: np.ndarray | None = None
) -> None:
    """Make the axis logarithmic if the values differ widely, else linear from zero.

    drawn: what stands on the axis, if that is more than the values; it decides on the ticks.
    """
    if spread_of(values) > LOG_RATIO:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        columns = axis.axes.get_subplotspec().get_gridspec().ncols
        room = 1000 if axis.axis_name == "y" or columns == 1 else 200
        is_wide = spread_of(values if drawn is None else drawn) > room
        axis.set_major_locator(LogLocator(subs=(1,) if is_wide else (1, 2, 5)))
        axis.set_minor_locator(NullLocator())
    else:
        axis.axes.set(**{f"{axis.axis_name}lim": (0, None)})
    axis.set_major_formatter(formatter)
