"""Write one HTML file that shows a comparison to a colleague: it needs no network and no server.

page.html beside this file has its frame, its style and its script. What stands in it: the question
and its answer, the table (sorted by a click), the Pareto front and the curves with their values,
what differs between the configs, the commands, versions and hardware, and the rows as CSV.
"""

import json
import shlex
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from bandwidth_analysis.errors import AnalysisError, printable
from bandwidth_analysis.group_table import Column, columns_of, format_table, notes
from bandwidth_analysis.groups import NO_SETTINGS, Group, group_names
from bandwidth_analysis.page_charts import charts, legend
from bandwidth_analysis.pareto import on_front
from bandwidth_analysis.records import Record
from bandwidth_analysis.runs import Run

TEMPLATE = Path(__file__).with_name("page.html")


def write_page(records: list[Record], path: Path) -> None:
    """Write the page. Raises AnalysisError if the file cannot be written."""
    text = page(records)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AnalysisError(
            f"{path}: the page cannot be written ({error.strerror}); name another file"
        ) from None


def page(records: list[Record]) -> str:
    """Return the page as HTML."""
    groups = [record.group for record in records]
    runs = [run for group in groups for run in group.runs]
    subjects = sorted({f"{run.model} on {run.dataset}" for run in runs})
    names = group_names(runs)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=_text(", ".join(subjects)),
        question=_text(question(records)),
        answer=_text(answer(records)),
        table=_table(records),
        notes="".join(f"<p>{_text(note)}</p>" for note in notes(records)),
        legend=legend(names),
        charts=charts(records, names),
        differences=_differences(groups, names),
        commands="".join(f"<pre>{_text(command(run))}</pre>" for run in runs),
        environments=_environments(runs),
        csv=_text(format_table(records, "csv")),
    )


def question(records: list[Record]) -> str:
    return (
        f"Which of these {len(records)} settings reaches the best test accuracy, and which gets "
        f"close to it with the fewest bytes and in the least time?"
    )


def answer(records: list[Record]) -> str:
    """The most accurate group, and those that nothing beats in bytes and accuracy."""
    accuracy = [record.final_accuracy for record in records]
    megabytes = [record.mb.mean for record in records]
    front = on_front(megabytes, accuracy)
    if not front:
        return "No run is finished yet."
    best = max(front, key=accuracy.__getitem__)
    cheaper = sorted((p for p in front if p != best), key=accuracy.__getitem__, reverse=True)
    said = f"{_named(records[best])} is the most accurate, for {megabytes[best]:,.4g} MB."
    if not cheaper:
        return f"{said} No other setting sends less."
    rest = "; ".join(f"{_named(records[p])} for {megabytes[p]:,.4g} MB" for p in cheaper)
    return f"{said} With fewer bytes nothing beats {rest}."


def _named(record: Record) -> str:
    return f"{record.group.label} ({100 * record.mean_accuracy.mean:.2f} %)"


def command(run: Run) -> str:
    """The command that started the run, as its environment.json has it."""
    argv = run.environment.get("argv")
    if not isinstance(argv, list) or not argv:
        return f"{run.name}-s{run.seed}: its command is not recorded"
    return shlex.join(["python", *map(str, argv)])


def _text(text: str) -> str:
    """Any text as HTML."""
    return escape("".join(c if c == "\n" else printable(c) for c in text))


# --- tables ---------------------------------------------------------------------------------------


def _table(records: list[Record]) -> str:
    columns = columns_of(records)
    heading = "".join(_heading(column) for column in columns)
    rows = "".join(
        f"<tr>{''.join(_cell(column, record) for column in columns)}</tr>" for record in records
    )
    return f'<table class="sortable"><thead><tr>{heading}</tr></thead><tbody>{rows}</tbody></table>'


def _heading(column: Column) -> str:
    kind = ' class="text"' if column.is_text else ""
    return f"<th{kind}><button>{_text(column.above)}<br>{_text(column.below)}</button></th>"


def _cell(column: Column, record: Record) -> str:
    """A cell with the value by which its column is sorted: a number, or its text."""
    key = column.key(record)
    sort_by = key if isinstance(key, str) else f"{key:.10g}"
    kind = ' class="text"' if column.is_text else ""
    return f'<td{kind} data-key="{_text(sort_by)}">{_text(column.cell(record))}</td>'


def _plain_table(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in heading)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _differences(groups: list[Group], names: list[str]) -> str:
    """The keys of the configs whose values differ, a column for each group."""
    settings = [dict(flat(group.first.config)) for group in groups]
    keys = dict.fromkeys(key for one in settings for key in one)
    rows = [[key, *(one.get(key, "-") for one in settings)] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    if not differing:
        return "<p>The configs are alike.</p>"
    return _plain_table(["key", *names], differing)


def flat(config: dict, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield the dotted keys of a config with their values as text, but what is no setting."""
    for key, value in config.items():
        if f"{prefix}{key}" in (*NO_SETTINGS, "name"):
            continue
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False, default=str)


def _environments(runs: list[Run]) -> str:
    """Versions, commit and hardware, a row for each that differs, and the runs that had it."""
    found: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        found.setdefault(_facts(run.environment), []).append(f"{run.name}-s{run.seed}")
    rows = [[*facts, ", ".join(names)] for facts, names in found.items()]
    return _plain_table(["commit", "versions", "machine", "trained in", "runs"], rows)


def _facts(environment: dict[str, Any]) -> tuple[str, ...]:
    git, versions = (_mapping(environment.get(key)) for key in ("git", "versions"))
    commit = str(git.get("commit") or "unknown") + " with local changes" * bool(git.get("dirty"))
    python = {"Python": environment.get("python", "unknown")}
    packages = ", ".join(f"{name} {it}" for name, it in (python | versions).items() if it)
    gpus = environment.get("gpus") or []
    cores = f"{environment.get('cpu_count', 'unknown')} cores"
    machine = ", ".join([str(environment.get("platform", "unknown")), cores, *map(str, gpus)])
    processes = f"{environment.get('world_size', 1)} processes"
    return commit, packages, machine, f"{environment.get('precision', 'unknown')}, {processes}"


def _mapping(value: Any) -> dict:
    return value if isinstance(value, dict) else {}
