"""The table of groups as text, Markdown, LaTeX or CSV.

The first three have rounded cells for readers, CSV the numbers themselves.
"""

import csv
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from bandwidth_analysis.groups import Spread
from bandwidth_analysis.records import TARGET_OVER, Comparison, Record
from bandwidth_analysis.runs import DATASET_NAMES, fallback_notes
from bandwidth_analysis.table import aligned, duration, megabytes, reduction

LATEX_SPECIAL = {character: f"\\{character}" for character in "&%$#_{}"}
LATEX_SPECIAL |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}", "±": r"$\pm$"}


@dataclass(frozen=True)
class Column:
    """A column for readers: two lines of heading, and what it says of a record."""

    above: str
    below: str
    cell: Callable[[Record], str]
    key: Callable[[Record], float | str]  # by which the column can be sorted; NaN for no value
    is_text: bool = False


def _text(above: str, value: Callable[[Record], str]) -> Column:
    return Column(above, "", value, value, is_text=True)


def _numbers(
    above: str, below: str, value: Callable[[Record], float], show: Callable[[float], str]
) -> Column:
    return Column(above, below, lambda record: show(value(record)), value)


def _spreads(
    above: str, below: str, spread: Callable[[Record], Spread], show: Callable[[Spread], str]
) -> Column:
    return Column(above, below, lambda r: show(spread(r)), lambda r: spread(r).mean)


def _against(below: str, value: Callable[[Comparison], Any], show: Callable[[Any], str]) -> Column:
    """A column about the baseline, which has no such comparison itself."""
    return Column(
        "to baseline",
        below,
        lambda r: show(value(r.comparison)) if r.comparison else "-",
        lambda r: value(r.comparison) if r.comparison else float("nan"),
        is_text=show is str,
    )


COLUMNS = [
    _text("run", lambda r: r.group.label),
    _text("dataset", lambda r: r.group.first.dataset),
    _text("model", lambda r: r.group.first.model),
    _numbers("seeds", "", lambda r: r.group.num_seeds, str),
    Column("rounds", "", lambda r: _rounds(r), lambda r: r.group.first.num_rounds),
    _spreads("accuracy %", "last", lambda r: r.accuracy, lambda s: _percent(s)),
    _spreads("accuracy %", "mean of last k", lambda r: r.mean_accuracy, lambda s: _percent(s)),
    _spreads("MB up", "", lambda r: r.mb_up, lambda s: _megabytes(s)),
    _spreads("MB down", "", lambda r: r.mb_down, lambda s: _megabytes(s)),
    _numbers("reduction", "up", lambda r: r.ratio_up, reduction),
    _numbers("reduction", "down", lambda r: r.ratio_down, reduction),
    _numbers("reduction", "both", lambda r: r.ratio, reduction),
    _numbers("time", "simulated", lambda r: r.simulated_seconds.mean, duration),
    _spreads("a round, s", "computing", lambda r: r.computation, lambda s: _seconds(s)),
    _spreads("a round, s", "sending", lambda r: r.communication, lambda s: _seconds(s)),
    _spreads("a round, s", "whole", lambda r: r.step, lambda s: _seconds(s)),
]
UNTIL_TARGET = [
    Column("to {:g} %", "time", lambda r: _time_until(r), lambda r: r.target.seconds.mean),
    _spreads("to {:g} %", "MB up", lambda r: r.target.mb_up, lambda s: _megabytes(s)),
    _spreads("to {:g} %", "MB down", lambda r: r.target.mb_down, lambda s: _megabytes(s)),
]
AGAINST_BASELINE = [
    _against("points", lambda c: c.points, lambda points: _points(points)),
    _against("bytes", lambda c: c.fewer_bytes, lambda factor: _factor(factor)),
    _against("time", lambda c: c.less_time, lambda factor: _factor(factor)),
    _against("time to target", lambda c: c.less_time_to_target, lambda factor: _factor(factor)),
    _against("by chance?", lambda c: c.verdict, str),
]


def format_table(records: list[Record], kind: str) -> str:
    """Return the table; kind is a key of FORMATS."""
    return FORMATS[kind](records)


def columns_of(records: list[Record]) -> list[Column]:
    """The columns that these records have, with the target in their headings."""
    columns = list(COLUMNS)
    if target := records[0].target:
        percent = 100 * target.accuracy
        columns += [replace(c, above=c.above.format(percent)) for c in UNTIL_TARGET]
    if any(record.comparison for record in records):
        columns += [c for c in AGAINST_BASELINE if target or c.below != "time to target"]
    return columns


def notes(records: list[Record]) -> list[str]:
    """What a reader must know to read the table right, a sentence a line."""
    runs = [run for record in records for run in record.group.runs]
    return [*_seed_notes(records), *_target_notes(records), *_data_notes(records)] + (
        fallback_notes(runs)
    )


def _seed_notes(records: list[Record]) -> Iterator[str]:
    yield (
        "Accuracies are means over seeds ± one standard deviation; the seconds of a round are "
        "means [least, most] over rounds after the first, of a client's device and link."
    )
    if single := [record.group.label for record in records if record.group.num_seeds == 1]:
        yield f"One seed only, so that a difference may be chance: {', '.join(single)}."
    if unfinished := [record.group.label for record in records if not record.group.finished]:
        yield f"Unfinished, counted as far as it is: {', '.join(unfinished)}."


def _target_notes(records: list[Record]) -> Iterator[str]:
    if records[0].target:
        yield (
            f"To {100 * records[0].target.accuracy:g} %: until the first evaluation at which the "
            f"mean over the last {TARGET_OVER} reached it; a mean over seeds if all did."
        )


def _data_notes(records: list[Record]) -> Iterator[str]:
    labels: dict[str, list[str]] = {}
    for record in records:
        labels.setdefault(record.group.first.dataset, []).append(record.group.label)
    if len(labels) > 1:
        each = (f"{DATASET_NAMES.get(k, k)}: {', '.join(names)}" for k, names in labels.items())
        yield f"Accuracies on different data sets do not compare. {'; '.join(each)}."


# --- formats --------------------------------------------------------------------------------------


def _as_text(records: list[Record]) -> str:
    columns = columns_of(records)
    heading = [tuple(c.above for c in columns), tuple(c.below for c in columns)]
    is_left = [column.is_text for column in columns]
    return "\n".join([*aligned(heading, _cells(records, columns), is_left), *notes(records)])


def _as_markdown(records: list[Record]) -> str:
    columns = columns_of(records)
    rows = [[_heading(column) for column in columns]]
    rows += [["---" if column.is_text else "---:" for column in columns]]
    rows += [[cell.replace("|", "\\|") for cell in row] for row in _cells(records, columns)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *notes(records)])


def _as_latex(records: list[Record]) -> str:
    columns = columns_of(records)
    rows = [[_heading(column) for column in columns], *_cells(records, columns)]
    heading, *body = [" & ".join(map(_escape, row)) + r" \\" for row in rows]
    alignment = "".join("l" if column.is_text else "r" for column in columns)
    lines = [rf"\begin{{tabular}}{{{alignment}}}", r"\hline", heading, r"\hline", *body, r"\hline"]
    return "\n".join([*lines, r"\end{tabular}", *(f"% {note}" for note in notes(records))])


def _as_csv(records: list[Record]) -> str:
    rows = [dict(_flat(record)) for record in records]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


FORMATS = {"text": _as_text, "markdown": _as_markdown, "csv": _as_csv, "latex": _as_latex}


def _flat(record: Record) -> Iterator[tuple[str, str]]:
    """The columns of CSV: every number of a record, with its unit in its name."""
    group, target, comparison = record.group, record.target, record.comparison
    yield "run", group.label
    yield from (("dataset", group.first.dataset), ("model", group.first.model))
    yield from (("num_seeds", str(group.num_seeds)), ("num_runs", str(len(group.runs))))
    yield from (("rounds", str(group.first.num_rounds)), ("finished", str(group.finished)))
    for name in ("accuracy", "mean_accuracy", "mb_up", "mb_down", "simulated_seconds"):
        yield from _spread(name, getattr(record, name))
    for name in ("ratio_up", "ratio_down", "ratio"):
        yield name, _number(getattr(record, name))
    for name in ("computation", "communication", "step"):
        yield from _spread(f"{name}_seconds", getattr(record, name))
    if target:
        yield from (("target", _number(target.accuracy)), ("num_reached", str(target.num_reached)))
        for name in ("seconds", "mb_up", "mb_down"):
            yield from _spread(f"{name}_to_target", getattr(target, name))
    if comparison:
        for name in ("points", "fewer_bytes", "less_time", "less_time_to_target"):
            yield f"baseline_{name}", _number(getattr(comparison, name))
        yield "baseline_verdict", comparison.verdict


def _spread(name: str, spread: Spread) -> Iterator[tuple[str, str]]:
    yield f"{name}_mean", _number(spread.mean)
    yield f"{name}_sd", _number(spread.sd)
    yield f"{name}_min", _number(spread.low)
    yield f"{name}_max", _number(spread.high)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.8g}"


# --- cells ----------------------------------------------------------------------------------------


def _cells(records: list[Record], columns: list[Column]) -> list[tuple[str, ...]]:
    return [tuple(column.cell(record) for column in columns) for record in records]


def _heading(column: Column) -> str:
    return f"{column.above}, {column.below}" if column.below else column.above


def _rounds(record: Record) -> str:
    run = record.group.first
    return str(run.num_rounds) if run.finished else f"{run.num_rounds}/{run.rounds_planned}"


def _percent(accuracy: Spread) -> str:
    if math.isnan(accuracy.mean):
        return "-"
    text = f"{100 * accuracy.mean:.2f}"
    return text if math.isnan(accuracy.sd) else f"{text} ± {100 * accuracy.sd:.2f}"


def _seconds(seconds: Spread) -> str:
    if not seconds.values:
        return "-"
    return f"{seconds.mean:.3g} [{seconds.low:.3g}, {seconds.high:.3g}]"


def _time_until(record: Record) -> str:
    num_reached, num_runs = record.target.num_reached, len(record.group.runs)
    if num_reached == num_runs:
        return duration(record.target.seconds.mean)
    if num_reached:
        return f"{num_reached} of {num_runs} runs"
    return "never" if record.group.finished else "not yet"


def _megabytes(mb: Spread) -> str:
    return megabytes(mb.mean * 1e6) if mb.values else "-"


def _points(points: float) -> str:
    return "-" if math.isnan(points) else f"{points:+.2f}"


def _factor(factor: float) -> str:
    """Show how many times less than the baseline's a value is, or how many times more."""
    if math.isnan(factor) or factor == 0:
        return "-"
    return f"{factor:.3g}x less" if factor >= 1 else f"{1 / factor:.3g}x more"


def _escape(text: str) -> str:
    return "".join(LATEX_SPECIAL.get(character, character) for character in text)
