"""Ranks: the processes of a run, what they exchange, and which of them trains which client.

A run has one process, or several that a launcher started (startup/launchers.py); each is called a
rank. Tensors on CPUs are exchanged by gloo, tensors on GPUs by NCCL.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from heapq import heappop, heappush
from itertools import groupby
from math import inf
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, parse_flag_from_env
from torch import Tensor

from config import Config, ConfigError
from startup.launchers import in_time, join, read_launch, warn

T = TypeVar("T")
Blob = bytes | memoryview


class RankLost(Exception):
    """Another process of this run is gone, or did not answer in time."""


class Team:
    """The ranks that train one client together, each on its part of every batch."""

    def __init__(self, rank: int = 0, size: int = 1, index: int = 0, group: Any = None):
        """Make this process's view of its team.

        rank: of this process within the team; size: how many ranks the team has; index: which of
        all teams it is, from 0; group: torch's process group of the team.
        """
        self.rank, self.size, self.index, self._group = rank, size, index, group
        self.is_leader, self.received = rank == 0, 0

    def sum_(self, tensor: Tensor) -> None:
        """Replace the tensor by the sum of the tensors of all ranks of the team."""
        if self.size > 1:
            self.received += tensor.nbytes
            with _lost_ranks():
                dist.all_reduce(tensor, group=self._group)

    def broadcast(self, value: T) -> T:
        """Return the value that the team's leader gave, on every rank of the team."""
        if self.size == 1:
            return value
        box = [value]
        with _lost_ranks():
            dist.broadcast_object_list(box, self.index * self.size, group=self._group)
        return box[0]

    def close(self) -> None:
        """Let go of the group, whose threads end with the last who holds it."""
        self._group = None


class Ranks:
    """The processes of a run. Each must call the same methods in the same order as the others."""

    def __init__(self, config: Config):
        """Meet the other processes and choose this one's device.

        Raises ConfigError if the config or the launcher's variables are wrong, and RankLost if
        another process does not start.
        """
        settings, on_cpu = config.distributed, _trains_on_cpu(config)
        launch = read_launch(on_cpu)
        if launch.size % settings.ranks_per_client:  # before they meet, so that nobody waits
            raise ConfigError(
                f"distributed.ranks_per_client: {settings.ranks_per_client} does not divide the "
                f"{launch.size} processes"
            )
        launched_by_deepspeed = "CROSS_RANK" in os.environ  # set by its launcher and by no other
        self.use_deepspeed = settings.engine == "deepspeed" or (
            settings.engine == "auto" and launched_by_deepspeed
        )
        timeout = timedelta(seconds=settings.timeout_seconds)
        backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
        with_deepspeed = launched_by_deepspeed or self.use_deepspeed
        if with_deepspeed:
            _import_deepspeed(on_cpu)
        if launch.size > 1:
            with _lost_ranks():
                join(launch, backend, timeout)
        if with_deepspeed:
            _init_deepspeed(backend)
        self.accelerator = _make_accelerator(config, on_cpu, launch.rank)
        self.device = self.accelerator.device
        self.rank, self.size = launch.rank, launch.size
        self.is_main = self.rank == 0
        self.received = 0
        self._gather_buffers = torch.empty(self.size + 1, 0, dtype=torch.uint8)
        self._make_teams(settings.ranks_per_client, timeout)

    def _make_teams(self, size: int, timeout: timedelta) -> None:
        self.num_teams, number, group = self.size // size, self.rank // size, None
        if size > 1:
            members = [[*range(first, first + size)] for first in range(0, self.size, size)]
            with _lost_ranks():
                groups = in_time(
                    lambda: [dist.new_group(ranks, timeout=timeout) for ranks in members],
                    "the ranks of a team cannot connect to each other",
                )
            group = groups[number]
        self.team = Team(self.rank % size, size, number, group)

    @property
    def bytes_received(self) -> int:
        """How many bytes this process received: other ranks' bytes, and each sum once."""
        return self.received + self.team.received

    def gather(self, *parts: Blob) -> list[memoryview]:
        """Return the bytes that each rank gave, in the order of ranks.

        parts: this rank's bytes, which are joined. The next call overwrites the memory that is
        returned: a round's payloads are read where they arrive, in buffers that are made once.
        """
        if self.size == 1:
            return [memoryview(b"".join(parts))]
        length = sum(map(len, parts))
        with _lost_ranks():
            lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([length]))
            longest = max(map(int, lengths))
            buffers = self._buffers(longest)
            mine, at = buffers[self.size].numpy(), 0
            for part in parts:
                mine[at : at + len(part)] = np.frombuffer(part, np.uint8)
                at += len(part)
            everybody = [buffer[:longest] for buffer in buffers]
            dist.all_gather(everybody[:-1], everybody[-1])
        self.received += (self.size - 1) * (8 + longest)
        pairs = zip(everybody[:-1], map(int, lengths), strict=True)
        return [memoryview(tensor[:length].numpy()) for tensor, length in pairs]

    def _buffers(self, length: int) -> Tensor:
        """Return uint8 [size + 1, >= length]: a row to receive from each rank, and one to send."""
        if self._gather_buffers.shape[1] < length:
            self._gather_buffers = torch.empty(self.size + 1, length, dtype=torch.uint8)
        return self._gather_buffers

    def gather_json(self, value: Any) -> list[Any]:
        """Return the value that each rank gave, in the order of ranks; JSON makes keys strings."""
        return [json.loads(bytes(blob)) for blob in self.gather(json.dumps(value).encode())]

    def sum_(self, tensor: Tensor) -> None:
        """Add up all ranks' tensors, in place."""
        self._reduce(tensor, dist.ReduceOp.SUM)

    def maximum_(self, tensor: Tensor) -> None:
        """Take the largest of all ranks' values, entry by entry, in place."""
        self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, operation: Any) -> None:
        if self.size > 1 and len(tensor):
            self.received += tensor.nbytes
            with _lost_ranks():
                dist.all_reduce(tensor, operation)

    def on_all_ranks(self, work: Callable[[], T], main_first: bool = False) -> T:
        """Do `work` on every rank and return this rank's result.

        main_first: the other ranks begin when the main one is done. If the work fails anywhere, all
        ranks raise ConfigError with the first failure's message.
        """
        turns = (self.is_main, not self.is_main) if main_first else (True,)
        result, error = None, ""
        for my_turn in turns:
            if my_turn:
                try:
                    result = work()
                except Exception as caught:
                    if self.size == 1:
                        raise
                    error = str(caught) or type(caught).__name__
            failures = [message for message in self.gather_json(error) if message]
            if failures:
                raise ConfigError(failures[0])
        return result

    def close(self) -> None:
        """Part from the others; no collective may follow."""
        self.team.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def place(costs: dict[int, float], num_teams: int, holders: dict[int, int]) -> dict[int, int]:
    """Choose the team that trains each client: {client: team}.

    costs: each client's expected work, at least 0; holders: the teams that hold clients' states.

    The longest client comes first and goes to the team with the least work so far, by which the
    last team ends within 4/3 of the shortest possible time (Graham 1969). Among equally long
    clients and equally loaded teams, a client whose state such a team holds comes first and goes
    there.
    """
    holder = {client: holders.get(client, client % num_teams) for client in costs}
    loads, placed = [0.0] * num_teams, {}
    waiting = [[] for _ in range(num_teams)]  # by holder: the longest clients, in falling order

    def priority(team: int) -> tuple[float, float, int]:
        return loads[team], waiting[team][-1] if waiting[team] else inf, team

    teams = [priority(team) for team in range(num_teams)]  # a heap, with outdated entries in it
    longest_first = sorted(costs, key=lambda client: (-costs[client], client))
    for cost, group in groupby(longest_first, costs.get):
        equals = list(group)
        for client in reversed(equals):
            waiting[holder[client]].append(client)
        for team in {holder[client] for client in equals}:
            heappush(teams, priority(team))
        rest = iter(equals)
        for _ in equals:
            while teams[0] != priority(teams[0][2]):
                heappop(teams)
            _, client, team = teams[0]
            if client == inf:  # no team with the least work holds a waiting client's state
                client = next(client for client in rest if client not in placed)
            placed[client] = team
            loads[team] += cost
            waiting[holder[client]].pop()  # this is the client: the first of its holder's
            for changed in {team, holder[client]}:
                heappush(teams, priority(changed))
    return placed


@contextmanager
def _lost_ranks() -> Iterator[None]:
    """Raise RankLost in place of what torch raises when another process is gone."""
    try:
        yield
    except TimeoutError as error:  # a start that took too long, see startup/launchers.py
        raise RankLost(str(error)) from None
    except RuntimeError as error:
        if not re.search(r"connect|clos|peer|reset|tim(e|ed) ?out|broken", str(error), re.I):
            raise
        where, _, what = str(error).partition("] ")  # gloo begins with its source file
        reason = (what or where).splitlines()[0].partition(". ")[0]
        gone = "another process of this run is gone or does not answer"
        raise RankLost(f"{gone} ({reason})") from None


# Variables by which Accelerate would act without a word in the YAML, and what to use instead.
ACCELERATE_SETTINGS = {
    "ACCELERATE_MIXED_PRECISION": "use precision",
    "ACCELERATE_TORCH_DEVICE": "use device",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "use local.batch_size",
    "ACCELERATE_USE_DEEPSPEED": "use distributed.engine=deepspeed",
    "ACCELERATE_USE_FSDP": "every process holds the whole model",
    "ACCELERATE_USE_MEGATRON_LM": "every process holds the whole model",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "every process holds the whole model",
    "ACCELERATE_DYNAMO_BACKEND": "models are not compiled",
}


def _trains_on_cpu(config: Config) -> bool:
    """Whether the run uses CPUs: by `device`, by `accelerate launch --cpu` or for want of a GPU."""
    try:
        asked = parse_flag_from_env("ACCELERATE_USE_CPU")
    except ValueError:
        given = os.environ["ACCELERATE_USE_CPU"]
        raise ConfigError(f"ACCELERATE_USE_CPU is {given!r}, but must be true or false") from None
    if config.device == "cuda" and asked:
        raise ConfigError("ACCELERATE_USE_CPU is true, but device is cuda; use device=auto")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for and torch sees no GPU; use device=cpu")
    return asked or config.device == "cpu" or not torch.cuda.is_available()


def _make_accelerator(config: Config, on_cpu: bool, rank: int) -> Accelerator:
    """Make the Accelerator, which chooses the device and writes to the trackers.

    Raises ConfigError for an unknown tracker and for variables that Accelerate cannot follow here.
    """
    for name, advice in ACCELERATE_SETTINGS.items():
        value = os.environ.get(name, "").lower()
        agrees = name.endswith("PRECISION") and config.precision in ("auto", value)
        if value not in ("", "no", "false", "0", "1") and not agrees:
            raise ConfigError(
                f"{name} is {value}, which has no effect here: {advice}, and unset it"
            )
    known, installed = LoggerType.list(), ["all", *map(str, get_available_trackers())]
    for tracker in config.trackers:
        if tracker not in known:
            raise ConfigError(f"trackers: {tracker!r} is none of Accelerate's: {', '.join(known)}")
        if tracker not in installed and rank == 0:
            warn(f"trackers: {tracker} is not installed, so it records nothing")
    try:
        return Accelerator(
            mixed_precision="no",  # the training loop does it
            cpu=on_cpu,
            log_with=[tracker for tracker in config.trackers if tracker in installed] or None,
            project_dir=config.run_folder,
        )
    except ValueError as error:
        raise ConfigError(f"Accelerate cannot start: {str(error).splitlines()[0]}") from None


def _import_deepspeed(on_cpu: bool) -> None:
    """Import DeepSpeed before there is a process group.

    Later its functions would have the group as the default of an argument, and so keep it to the
    very end. Gloo's threads then outlive the interpreter, and one that frees a tensor kills the
    process.
    """
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        raise ConfigError("distributed.engine: deepspeed is not installed (Linux only)") from None
    if on_cpu:  # only inference uses this C++ kernel; building it takes minutes and a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _init_deepspeed(backend: str) -> None:
    """Give DeepSpeed the process group. DeepSpeed needs a group even for a single process."""
    import deepspeed

    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
