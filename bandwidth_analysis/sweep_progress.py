"""How far the runs of a sweep are: one table on a terminal, else a line for each change."""

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bandwidth_analysis.errors import printable
from bandwidth_analysis.sweep_jobs import PERIOD, Job

WAITING, RUNNING, FINISHED, FAILED = "waiting", "running", "finished", "failed"
REDRAW = "\x1b[{lines}F\x1b[J"  # to the start of the table, and clear what stands below


@dataclass
class Progress:
    """A run of a sweep as the watcher sees it."""

    label: str
    folder: Path
    log: Path
    rounds: int  # planned
    job: Job | None  # None: the run was finished before
    state: str = WAITING
    error: str = ""  # the first line that says why it failed
    done: int = 0  # rounds
    accuracy: float | None = None  # the last one, from 0 to 1

    def update(self) -> bool:
        """Look at the job and the run's files; return whether the state is another."""
        before = self.state
        if self.job is None:
            self.state = FINISHED
        elif self.job.done():
            self.state, self.error = outcome(self.job, self.log)
        elif self.log.exists():
            self.state = RUNNING
        if before in (WAITING, RUNNING):
            self._read_rounds()
        return self.state != before

    def _read_rounds(self) -> None:
        path = self.folder / "rounds.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        self.done = len(lines)
        for line in reversed(lines):
            try:
                accuracy = json.loads(line)["test_accuracy"]
            except (ValueError, KeyError):  # the run is just being cut back to its checkpoint
                continue
            if accuracy is not None:
                self.accuracy = accuracy
                return

    def line(self) -> str:
        accuracy = "" if self.accuracy is None else f"{self.accuracy:.2%}"
        return f"{self.state:8}  {self.done:>5}/{self.rounds:<5}  {accuracy:>7}  {self.label}"


def outcome(job: Job, log: Path) -> tuple[str, str]:
    """The state in which a job ended, and the first line that says why, if it failed."""
    try:
        status = job.result()
    except Exception as error:  # SLURM lost the job, or could not start Python
        return FAILED, printable(f"{type(error).__name__}: {error}".split("\n")[0])
    return (FINISHED, "") if status == 0 else (FAILED, first_error(log, status))


def first_error(log: Path, status: int) -> str:
    """What a failed run said first: its own error, or what a traceback ends in."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    for line in lines:
        if line.startswith("error: "):
            return printable(line.removeprefix("error: "))
    if status < 0:
        return f"killed by signal {-status}; start the sweep again, and the run resumes"
    said = [line for line in lines if line.strip()]
    return printable(said[-1]) if said else f"exit status {status}, and it said nothing"


def watch(runs: list[Progress]) -> None:
    """Show the runs until all jobs are done."""
    screen = Screen() if sys.stdout.isatty() else None
    while True:
        changed = [run for run in runs if run.update()]
        if screen:
            screen.show(runs)
        else:
            for run in changed:
                if run.job:
                    print(f"{run.line()}{f': {run.error}' * bool(run.error)}", flush=True)
        if not any(run.state in (WAITING, RUNNING) for run in runs):
            return
        time.sleep(PERIOD)


class Screen:
    """The table of all runs, drawn over the one before."""

    def __init__(self):
        self.height = 0  # of the table that stands there

    def show(self, runs: list[Progress]) -> None:
        size = shutil.get_terminal_size()
        lines = table(runs, size.lines - 2)
        if self.height:
            print(REDRAW.format(lines=self.height), end="")
        print("\n".join(line[: size.columns - 1] for line in lines), flush=True)
        self.height = len(lines)


def table(runs: list[Progress], height: int) -> list[str]:
    """How many runs are in each state, then a line for each.

    Where that is more than `height` lines, runs that wait or are finished have none.
    """
    states = [run.state for run in runs]
    counts = {state: states.count(state) for state in (FINISHED, RUNNING, WAITING, FAILED)}
    heading = f"{len(runs)} runs: " + ", ".join(f"{n} {state}" for state, n in counts.items())
    if len(runs) >= height:
        runs = [run for run in runs if run.state in (RUNNING, FAILED)]
    return [heading, *(run.line() for run in runs)][:height]
