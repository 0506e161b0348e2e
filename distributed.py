"""Ranks: who am I, on which device, and how payloads get from rank to rank.

The same program runs under python, torchrun, accelerate launch (Accelerate sets up the process
group) and the deepspeed launcher (DeepSpeed does): gloo between CPUs, NCCL between GPUs.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator

from config import Config, ConfigError

T = TypeVar("T")


@dataclass
class Report:
    """What one client sends after training: payloads by kind, or why there are none."""

    client: int
    num_examples: int
    loss: float = 0.0  # mean over the batches
    reach: float = 0.0  # see algorithms.py
    num_skipped: int = 0  # steps that fp16 left out
    failure: str = ""
    payloads: dict[str, bytes] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)  # how many each payload carries

    def add(self, kind: str, payload: bytes, numbers: int) -> None:
        self.payloads[kind], self.numbers[kind] = payload, numbers


class Ranks:
    """The processes of a run; every method is called by all of them, in the same order."""

    def __init__(self, config: Config):
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device: cuda was asked for and torch sees no GPU; use device=cpu")
        on_cpu = config.device == "cpu" or not torch.cuda.is_available()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            _init_process_group(on_cpu)
        try:
            self.accelerator = Accelerator(
                cpu=on_cpu, log_with=config.trackers or None, project_dir=config.run_folder
            )
        except ValueError as error:
            raise ConfigError(f"trackers: {str(error).splitlines()[0]}") from None
        self.device = self.accelerator.device
        self.rank = self.accelerator.process_index
        self.size = self.accelerator.num_processes
        self.is_main = self.rank == 0

    def owns(self, client: int) -> bool:
        """A client is always trained by the same rank, where its state lives."""
        return client % self.size == self.rank

    def gather(self, blob: bytes) -> list[bytes]:
        """Everybody's bytes, in rank order. Nothing but the bytes and their lengths travels."""
        if self.size == 1:
            return [blob]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(blob)]))
        longest = max(int(length) for length in lengths)
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(blob)] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
        everybody = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everybody, mine)
        pairs = zip(everybody, lengths, strict=True)
        return [tensor[: int(length)].numpy().tobytes() for tensor, length in pairs]

    def gather_json(self, value: Any) -> list[Any]:
        return [json.loads(blob) for blob in self.gather(json.dumps(value).encode())]

    def exchange(self, reports: list[Report] | None) -> list[Report] | None:
        """All reports of all ranks, in client order; None if a rank gave None to stop the run."""
        if self.size == 1:
            return reports
        blobs = self.gather(b"stop" if reports is None else _pack_reports(reports))
        if b"stop" in blobs:
            return None
        everybody = [report for blob in blobs for report in _unpack_reports(blob)]
        return sorted(everybody, key=lambda report: report.client)

    def together(self, work: Callable[[], T], main_first: bool = False) -> T:
        """Do `work` on every rank, or on the main one first; if one fails, all raise its error."""
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
        if dist.is_initialized():
            dist.destroy_process_group()


def _init_process_group(on_cpu: bool) -> None:
    backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
    if "CROSS_RANK" in os.environ:  # set by DeepSpeed's launcher and by no other
        import deepspeed

        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    else:
        dist.init_process_group(backend)


def _pack_reports(reports: list[Report]) -> bytes:
    """A line of JSON that says what follows, then the payloads one after the other."""
    heads = [
        dict(vars(r), payloads={kind: len(payload) for kind, payload in r.payloads.items()})
        for r in reports
    ]
    payloads = [payload for r in reports for payload in r.payloads.values()]
    return b"".join([json.dumps(heads).encode(), b"\n", *payloads])


def _unpack_reports(blob: bytes) -> list[Report]:
    line, _, rest = blob.partition(b"\n")
    reports, position = [], 0
    for head in json.loads(line):
        payloads = {}
        for kind, length in head.pop("payloads").items():
            payloads[kind] = rest[position : position + length]
            position += length
        reports.append(Report(**head, payloads=payloads))
    return reports
