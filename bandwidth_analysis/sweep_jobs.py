"""Where the runs of a sweep are trained: as processes of this machine, or as jobs of SLURM.

Both take callables and return futures: a thread pool of the standard library here, submitit's
executor on a cluster. Neither plans anything; who comes first is in the order of the sweep's file.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import IO, Any, Protocol

PERIOD = 0.5  # seconds between two looks at what others do
STOPPED = 130  # the exit status of a run that was interrupted, with its checkpoint written


class Job(Protocol):
    """A future; its result is the exit status of the run."""

    def done(self) -> bool: ...
    def result(self) -> int: ...


@dataclass(frozen=True)
class Training:
    """Calling it trains one run, to its end, and returns the exit status of its process."""

    words: list[str]  # of the command, after `python`
    folder: Path  # of the run
    log: Path  # gets what the run prints

    def __call__(self) -> int:
        while self.is_elsewhere():
            time.sleep(PERIOD)
        return self.start().wait()

    def checkpoint(self) -> Any:
        """submitit calls this before SLURM ends the job: the job is queued again and resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def is_elsewhere(self) -> bool:
        """Whether a process trains this run that an earlier, killed start of the sweep left."""
        try:
            with open(self.folder / ".lock", "rb") as file:
                return is_locked(file)
        except FileNotFoundError:
            return False

    def start(self, **environment: str) -> subprocess.Popen:
        """Start the run's process; a Ctrl-C in the sweep's terminal does not reach it."""
        with open(self.log, "wb") as log:
            return subprocess.Popen(
                [sys.executable, *self.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
            )


def is_locked(file: IO) -> bool:
    """Whether another process holds the lock of a file; else this one does until it closes it.

    Where the file system has no locks, nobody is taken to hold one.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


class LocalJobs:
    """Trains runs as processes of this machine, so many at a time, each on a share of it."""

    def __init__(self, jobs: int):
        self._pool = ThreadPoolExecutor(jobs)
        self._shares: SimpleQueue[dict[str, str]] = SimpleQueue()
        for share in machine_shares(jobs):
            self._shares.put(share)
        self._processes: set[subprocess.Popen] = set()
        self._is_stopped = False
        self._lock = Lock()  # held while a process starts and while all are told to stop

    def submit(self, training: Training) -> Job:
        return self._pool.submit(self._train, training)

    def stop(self) -> None:
        """Let the runs write their checkpoints, and wait for them."""
        with self._lock:
            self._is_stopped = True
            for process in self._processes:
                process.send_signal(signal.SIGTERM)
        self._pool.shutdown(cancel_futures=True)

    def _train(self, training: Training) -> int:
        while training.is_elsewhere() and not self._is_stopped:
            time.sleep(PERIOD)
        share = self._shares.get()
        try:
            with self._lock:
                if self._is_stopped:
                    return STOPPED
                process = training.start(**share)
                self._processes.add(process)
            status = process.wait()
            with self._lock:
                self._processes.remove(process)
            return status
        finally:
            self._shares.put(share)


def machine_shares(jobs: int) -> list[dict[str, str]]:
    """The environment of each of `jobs` processes: its GPU, in turn, and its part of the cores.

    One that trains alone gets what there is. A number of threads that the caller's environment
    sets stays.
    """
    if jobs == 1:
        return [{}]
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    gpus = found if given is None else [gpu for gpu in given.split(",") if gpu]
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    shares = [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)} for _ in range(jobs)]
    for place, share in enumerate(shares):
        if gpus:
            share["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    return shares


class SlurmJobs:
    """Trains runs as jobs of a SLURM cluster, submitted one by one; SLURM says how many at a time.

    parameters: of submitit's AutoExecutor, such as timeout_min, gpus_per_node and slurm_partition.
    Raises ValueError, in one line, if one is unknown or missing or if there is no SLURM here.
    """

    def __init__(self, folder: Path, parameters: dict[str, Any]):
        from submitit import AutoExecutor

        if "timeout_min" not in parameters:
            raise ValueError("give timeout_min, the minutes after which a run is queued again")
        try:
            self._executor = AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=100)
            self._executor.update_parameters(**{"name": "sweep"} | parameters)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise ValueError(str(error).split("\n")[0]) from None
        self._jobs: list[Any] = []

    def submit(self, training: Training) -> Job:
        job = self._executor.submit(training)
        self._jobs.append(job)
        return job

    def stop(self) -> None:
        for job in self._jobs:
            job.cancel()
