"""The comparison table: plain text, one row for each run."""

import math

from bandwidth_analysis.runs import Run, fallback_notes, run_labels

HEADER = (
    ("run", ""),
    ("dataset", ""),
    ("model", ""),
    ("rounds", ""),
    ("accuracy %", "last"),
    ("accuracy %", "mean of last k"),
    ("MB up", ""),
    ("MB down", ""),
    ("reduction", "up"),
    ("reduction", "down"),
    ("time", "simulated"),
    ("time", "wall"),
    ("waiting", "a round"),
    ("busy %", "links"),
    ("busy %", "devices"),
)
NUM_TEXT_COLUMNS = 3  # run, dataset and model are aligned left; numbers, after them, right


def comparison_table(runs: list[Run]) -> str:
    """Return accuracy, megabytes (10^6 bytes) and time of each run, in aligned columns.

    A reduction is the size of the messages in float32 divided by the bytes that were really sent.
    Waiting is how long the clients of a round that were averaged had been done when the last of
    them was, summed over them; busy is the share of a round in which a client's link carried a
    message and its device computed. These are means over the rounds.
    A run without a summary is marked "unfinished"; its row counts what its ledger and rounds hold
    so far. If a run used another data set than the configured one, a line below the table says why.
    """
    rows = [_row(run, label) for run, label in zip(runs, run_labels(runs), strict=True)]
    rows = [*zip(*HEADER, strict=True), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(2, tuple("-" * width for width in widths))
    return "\n".join([*(_line(row, widths) for row in rows), *fallback_notes(runs)])


def _row(run: Run, label: str) -> tuple[str, ...]:
    return (
        label,
        run.dataset,
        run.model,
        str(run.num_rounds)
        if run.finished
        else f"{run.num_rounds}/{run.rounds_planned} unfinished",
        _percent(run.last_accuracy),
        f"{_percent(run.mean_accuracy)} (k={run.mean_over})",
        _megabytes(run.total("bytes_up")),
        _megabytes(run.total("bytes_down")),
        _reduction(run.total("dense_bytes_up"), run.total("bytes_up")),
        _reduction(run.total("dense_bytes_down"), run.total("bytes_down")),
        _duration(run.simulated_seconds),
        _duration(run.wall_seconds),
        "-" if math.isnan(run.waited_seconds) else _duration(run.waited_seconds),
        _percent(run.link_utilisation),
        _percent(run.device_utilisation),
    )


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    padded = [
        cell.ljust(width) if column < NUM_TEXT_COLUMNS else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def _percent(fraction: float) -> str:
    return "-" if math.isnan(fraction) else f"{100 * fraction:.2f}"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f}" if num_bytes >= 10e6 else f"{num_bytes / 1e6:.3f}"


def _reduction(dense_bytes: int, num_bytes: int) -> str:
    if num_bytes == 0:
        return "-"
    ratio = dense_bytes / num_bytes
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
