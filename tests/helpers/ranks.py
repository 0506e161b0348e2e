"""Ranks that are threads of this process: as many as a test wants, within milliseconds."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from distributed import Team

PATIENCE = 60  # seconds


class ThreadRanks:
    """What federation/ uses of distributed.Ranks, between threads; every team is one rank."""

    def __init__(self, rank: int, size: int, slots: list, barrier: threading.Barrier):
        self.rank, self.size, self.num_teams = rank, size, size
        self.team, self.slots, self.barrier = Team(index=rank), slots, barrier

    def gather(self, *parts):
        return [memoryview(blob) for blob in self._everybodys(b"".join(parts))]

    def gather_json(self, value):
        return [json.loads(text) for text in self._everybodys(json.dumps(value))]

    def sum_(self, tensor):
        tensor.copy_(sum(self._everybodys(tensor.clone())))

    def maximum_(self, tensor):
        tensor.copy_(torch.stack(self._everybodys(tensor.clone())).amax(0))

    def _everybodys(self, value) -> list:
        self.slots[self.rank] = value
        self.barrier.wait(PATIENCE)
        found = list(self.slots)
        self.barrier.wait(PATIENCE)
        return found


def on_ranks(size: int, work: Callable) -> list:
    """Do work(ranks) on so many ranks at once; return what each returned or raised."""
    slots, barrier = [None] * size, threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        futures = [
            pool.submit(work, ThreadRanks(rank, size, slots, barrier)) for rank in range(size)
        ]
        return [future.exception() or future.result() for future in futures]
