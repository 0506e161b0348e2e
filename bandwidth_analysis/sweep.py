"""Train many runs: python -m bandwidth_analysis.sweep configs/sweeps/NAME.yaml [--dry_run].

sweep_file.py says what a sweep's file holds. Each run is a process of its own with the command that
a user would type. The same command goes on where it was ended in any way: a finished run is
skipped, any other is started again and resumes from its checkpoint.

Exit statuses: 0 all runs are finished; 1 some failed; 2 the sweep is wrong and nothing was started;
130 interrupted, with the runs' checkpoints written.
"""

import shlex
import signal
import sys
from contextlib import chdir
from pathlib import Path

from bandwidth_analysis.errors import printable
from bandwidth_analysis.sweep_file import PlannedRun, Sweep, read_sweep
from bandwidth_analysis.sweep_jobs import LocalJobs, SlurmJobs, Training, is_locked
from bandwidth_analysis.sweep_progress import FAILED, Progress, watch
from command_line import Parser
from config import PROJECT, ConfigError
from startup.terminal import outlive_readers


def main(argv: list[str] | None = None) -> int:
    """Do a sweep, or say what it would do; return the exit status."""
    parser = Parser(prog="python -m bandwidth_analysis.sweep", description=__doc__.split(".\n")[0])
    parser.add_argument("sweep", type=Path, help="a YAML file, such as configs/sweeps/NAME.yaml")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, and end")
    arguments = parser.parse_args(argv)
    path = arguments.sweep.resolve()
    with chdir(PROJECT):  # where a user types the commands
        try:
            sweep = read_sweep(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path)
            if arguments.dry_run:
                return _say_what_it_would_do(sweep)
            return train(sweep, path.stem)
        except (ConfigError, OSError) as error:
            print(printable(f"error: {error}"), file=sys.stderr)
            return 2


def train(sweep: Sweep, name: str) -> int:
    """Train the runs that are not finished, show how far they are, and list those that failed."""
    logs = sweep.output_dir / f".{name}-sweep"
    logs.mkdir(parents=True, exist_ok=True)
    with open(logs / ".lock", "wb") as lock:
        if is_locked(lock):
            raise ConfigError(f"{logs}: another process is doing this sweep; wait for it or end it")
        return _train(sweep, logs)


def _train(sweep: Sweep, logs: Path) -> int:
    jobs = _make_jobs(sweep, logs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        runs = [_begin(run, jobs, logs) for run in sweep.runs]
        skipped = sum(run.job is None for run in runs)
        print(f"{len(runs)} runs, {skipped} finished before; their output: {logs}", flush=True)
        watch(runs)
    except KeyboardInterrupt:
        print("stopping: the runs write their checkpoints", file=sys.stderr, flush=True)
        jobs.stop()
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    failed = [run for run in runs if run.state == FAILED]
    for run in failed:
        print(f"failed: {run.label}: {run.error} ({run.log})", file=sys.stderr)
    where = shlex.quote(str(sweep.output_dir))
    print(f"compare: python -m bandwidth_analysis {where}/* --table text")
    return 1 if failed else 0


def _make_jobs(sweep: Sweep, logs: Path) -> LocalJobs | SlurmJobs:
    if sweep.slurm is None:
        return LocalJobs(sweep.jobs)
    try:
        return SlurmJobs(logs / "slurm", sweep.slurm)
    except ValueError as error:
        raise ConfigError(f"slurm: {error}") from None


def _begin(run: PlannedRun, jobs: LocalJobs | SlurmJobs, logs: Path) -> Progress:
    """Hand a run that is not finished to the jobs; return what the watcher needs to know."""
    log, job = logs / f"{run.folder.name}.log", None
    if not run.is_finished:
        training = Training(run.words, run.folder, log)
        if not training.is_elsewhere():
            log.unlink(missing_ok=True)  # it appears when the run starts
        job = jobs.submit(training)
    return Progress(run.folder.name, run.folder, log, run.config.rounds, job)


def _say_what_it_would_do(sweep: Sweep) -> int:
    for run in sweep.runs:
        started = (run.folder / "checkpoint.pt").exists()
        state = "finished" if run.is_finished else "resumes" if started else "new"
        print(printable(f"{state:8}  {run.command}"))
    return 0


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
