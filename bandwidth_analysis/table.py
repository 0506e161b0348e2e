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
    is_left = [column < NUM_TEXT_COLUMNS for column in range(len(HEADER))]
    heading = list(zip(*HEADER, strict=True))
    return "\n".join([*aligned(heading, rows, is_left), *fallback_notes(runs)])


def aligned(
    heading: list[tuple[str, ...]], rows: list[tuple[str, ...]], is_left: list[bool]
) -> list[str]:
    """Return the lines of a table with a rule under its heading; is_left: of each column."""
    widths = [max(map(len, column)) for column in zip(*heading, *rows, strict=True)]
    rule = tuple("-" * width for width in widths)
    return [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, is_left, strict=True)
        ).rstrip()
        for row in [*heading, rule, *rows]
    ]


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
        megabytes(run.total("bytes_up")),
        megabytes(run.total("bytes_down")),
        reduction(_ratio(run, "up")),
        reduction(_ratio(run, "down")),
        duration(run.simulated_seconds),
        duration(run.wall_seconds),
        "-" if math.isnan(run.waited_seconds) else duration(run.waited_seconds),
        _percent(run.link_utilisation),
        _percent(run.device_utilisation),
    )


def _ratio(run: Run, direction: str) -> float:
    sent = run.total(f"bytes_{direction}")
    return run.total(f"dense_bytes_{direction}") / sent if sent else float("nan")


def _percent(fraction: float) -> str:
    return "-" if math.isnan(fraction) else f"{100 * fraction:.2f}"


def megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f}" if num_bytes >= 10e6 else f"{num_bytes / 1e6:.3f}"


def reduction(ratio: float) -> str:
    """Show dense bytes divided by sent bytes; NaN if nothing was sent."""
    if math.isnan(ratio):
        return "-"
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
