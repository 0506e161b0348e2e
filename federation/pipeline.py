"""Clients are encoded, and what they send is decoded, on threads while the next ones train.

So is what brings a client its own copy of the model, ahead of its training.

The compiled loops of the codecs release Python's interpreter lock. On a GPU each thread has a
stream of its own, so that its small kernels and copies run beside those of training.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

import torch

from compression import Memory, PayloadMemory
from federation.phases import in_phases_of_this_thread

T = TypeVar("T")
MOST_THREADS = 8


def num_coding_threads(device: torch.device) -> int:
    """How many threads encode: none on a CPU, whose cores train, and else one core is left."""
    if device.type == "cpu":
        return 0
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # they share the cores of this machine
    return min(MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // ranks - 1))


def _begin(device: torch.device, streams: threading.local) -> None:
    """A thread begins: its device is that of training, and it gets a stream."""
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        # Of high priority, so that it is never the stream on which CUDA graphs are recorded: torch
        # deals out the same 32 streams again and again, those of a priority by themselves.
        streams.own = torch.cuda.Stream(device, priority=-1)


class Pipeline:
    """Does jobs on threads, a few at a time, and hands out their results in order.

    device: of training. num_threads: with 0, each job is done when it is met.
    """

    def __init__(self, device: torch.device, num_threads: int):
        self.device = device
        self.streams = threading.local()
        begin = partial(_begin, device, self.streams)  # and not a method, which would keep `self`
        self.pool = ThreadPoolExecutor(num_threads, "coding", begin) if num_threads else None
        # So many jobs are under way or wait to be read, and each has memory of its own.
        self.memories = [PayloadMemory() for _ in range(num_threads + 1)]

    def run(self, jobs: Iterable[Callable[[Memory], T]], keep: bool = False) -> Iterator[T]:
        """The results of the jobs, in order; a job is given memory for the payloads it makes.

        The next job is drawn from `jobs`, which may train a client for it, while those before are
        under way. A payload is valid until the next result is asked for or, with keep, until
        clear(). If a job or `jobs` fails, the jobs under way end first.
        """
        waiting: deque[tuple[Future, PayloadMemory]] = deque()
        try:
            for number, job in enumerate(jobs):
                memory = self.memories[number % len(self.memories)]
                waiting.append((self._submit(job, memory.take), memory))
                if len(waiting) == len(self.memories):
                    yield from self._hand_out(waiting, keep)
            while waiting:
                yield from self._hand_out(waiting, keep)
        finally:
            wait([future for future, _ in waiting])

    def clear(self) -> None:
        """The payloads that were kept are of no more use."""
        for memory in self.memories:
            memory.clear()

    def _hand_out(self, waiting: deque, keep: bool) -> Iterator[T]:
        future, memory = waiting.popleft()
        yield future.result()
        if not keep:
            memory.clear()

    def _submit(self, job: Callable[[Memory], T], memory: Memory) -> Future:
        if self.pool is None:
            done: Future = Future()
            done.set_result(job(memory))
            return done
        job = in_phases_of_this_thread(job)
        if self.device.type != "cuda":
            return self.pool.submit(job, memory)
        trained = torch.cuda.Event()
        trained.record(torch.cuda.current_stream(self.device))
        return self.pool.submit(self._on_own_stream, job, memory, trained)

    def _on_own_stream(self, job: Callable[[Memory], T], memory: Memory, trained) -> T:
        """Do a job once the device has done what was queued for training until `trained`."""
        stream = self.streams.own
        with torch.cuda.stream(stream):
            stream.wait_event(trained)
            result = job(memory)
            stream.synchronize()
        return result
