"""Clients' residuals in a set amount of memory, and rounds that do not grow with the clients.

    python benchmarks/memory.py [--root ../shared/data] [--output DIR] [--json] [--part PART]

big: main.py with a ResNet-18, all of 500 clients in every round, error feedback, local work of one
step on two pictures: 22 GB of residuals (45 GB of disk below --output while a checkpoint is
written). It is killed with SIGKILL in the middle of round 2, after its checkpoint of round 1, and
started again; then every residual that the checkpoint names must be there, and those of a sample
be what they were, to the bit. Peak RSS is the kernel's figure for the process (ru_maxrss).

flat: main.py with LeNet on 32x32 pictures, 100 of 100, 1,000 and 10,000 clients in a round. Seconds
per round are the median over blocks of ten rounds, each with its checkpoint, by the clock of this
script; RSS is the peak.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

REPOSITORY = Path(__file__).parent.parent
FIXED = ["data.name=cifar10", "precision=fp32", "local.steps=1", "trackers=[]"]
FIXED += ["uplink.error_feedback=true", "data.partition.name=iid", "evaluation.every=1000000"]
BIG = ["model.name=resnet18", "model.norm=group(2)", "local.batch_size=2", "rounds=4"]
BIG += ["checkpoint.every=1"]
FLAT = ["model.name=lenet", "clients.per_round=100", "local.batch_size=4", "checkpoint.every=10"]
FLAT += ["clients.state_memory_gib=0.02"]  # filled by 100 clients too
SIZES = (100, 1_000, 10_000)
BLOCK, NUM_BLOCKS = 10, 5  # rounds; one more block warms up


class Run:
    """main.py in a process of its own, whose end the kernel accounts for."""

    def __init__(self, output: Path, name: str, overrides: list[str]):
        self.folder = output / f"{name}-s1"
        words = [f"output_dir={output}", f"name={name}", *FIXED, *overrides]
        command = [sys.executable, "main.py", "--config", "configs/cifar10_resnet18.yaml", *words]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def rounds(self) -> Iterator[int]:
        """The number of each round, as soon as it and its checkpoint are done."""
        for line in self.process.stdout:
            if done := re.match(r"round (\d+)/", line):
                yield int(done[1])

    def is_running(self) -> bool:
        return self.process.returncode is None and self.process.poll() is None

    def end(self, number: int) -> float:
        """Send a signal, wait for the end; return the peak RSS in GiB."""
        os.kill(self.process.pid, number)
        self.process.stdout.close()
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return usage.ru_maxrss / 2**20


def measure_big(output: Path, root: str, num_clients: int, budget: float) -> dict[str, float]:
    """The peak RSS of a run before and after a kill. AssertionError if one is lost."""
    overrides = [*BIG, f"data.root={root}", f"clients.state_memory_gib={budget}"]
    overrides += [f"clients.total={num_clients}", f"clients.per_round={num_clients}"]
    first = Run(output, "big", overrides)
    begin = time.perf_counter()
    next(first.rounds())
    seconds = time.perf_counter() - begin
    versions, sums = residuals(first.folder)
    assert len(versions) == num_clients
    print(f"round 1 of {num_clients} clients and its checkpoint: {seconds:.0f} s", flush=True)
    while len(list((first.folder / "clients").glob("*-2.pt"))) < num_clients // 5:
        assert first.is_running()
        time.sleep(0.5)
    peaks = [first.end(signal.SIGKILL)]
    assert residuals(first.folder) == (versions, sums), "residuals changed in a killed round"
    second = Run(output, "big", overrides)
    assert next(second.rounds()) == 2, "did not go on from the checkpoint"
    versions, after = residuals(second.folder)
    assert set(versions.values()) == {2} and len(versions) == num_clients
    assert not after.keys() & sums.keys() and len(set(after.values())) == len(after)
    peaks.append(second.end(signal.SIGTERM))
    size = sum(path.stat().st_size for path in (second.folder / "clients").iterdir())
    return {
        "num_clients": num_clients,
        "states_gib": size / 2**30,
        "budget_gib": budget,
        "peak_rss_gib": max(peaks),
        "rss_over_budget_gib": max(peaks) - budget,
        "seconds_first_round": seconds,
    }


def residuals(folder: Path) -> tuple[dict[int, int], dict[str, str]]:
    """The versions that the checkpoint names, all of them readable; sha256 of every tenth."""
    versions = torch.load(folder / "checkpoint.pt", weights_only=True, mmap=True)["clients"]
    sums = {}
    for client, version in sorted(versions.items()):
        path = folder / "clients" / f"{client}-{version}.pt"
        residual = torch.load(path, weights_only=True, mmap=True)["residual"]
        if client % 10 == 0:
            sums[path.name] = hashlib.sha256(residual.numpy().data).hexdigest()
    return versions, sums


def measure_flat(output: Path, root: str, num_clients: int) -> dict[str, float]:
    """Median seconds of a round, its checkpoint included, and peak RSS in GiB."""
    rounds = BLOCK * (NUM_BLOCKS + 1)
    overrides = [*FLAT, f"data.root={root}", f"clients.total={num_clients}", f"rounds={rounds + 2}"]
    run = Run(output, f"flat{num_clients}", overrides)
    times = []
    for number in run.rounds():
        if number % BLOCK == 0:
            times.append(time.perf_counter())
        if number == rounds:
            break
    blocks = [b - a for a, b in zip(times[:-1], times[1:], strict=True)]
    peak = run.end(signal.SIGKILL)
    assert len(blocks) == NUM_BLOCKS
    return {"seconds_per_round": statistics.median(blocks) / BLOCK, "rss_gib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of the clients' states.")
    parser.add_argument("--root", default="../shared/data", help="where CIFAR-10 is")
    parser.add_argument("--output", help="a folder on a disk with 50 GB free; default: TMPDIR")
    parser.add_argument("--clients", type=int, default=500, help="of the big run")
    parser.add_argument("--budget", type=float, default=2.0, help="of the big run, GiB")
    parser.add_argument("--part", choices=["big", "flat"], help="only this part")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    args = parser.parse_args()
    results: dict[str, object] = {}
    if args.output:
        Path(args.output).mkdir(parents=True, exist_ok=True)
    if args.part != "flat":
        with tempfile.TemporaryDirectory(dir=args.output) as folder:
            found = measure_big(Path(folder), args.root, args.clients, args.budget)
        results |= found
        print(
            f"{args.clients} residuals of a ResNet-18, {found['states_gib']:.1f} GiB: peak RSS "
            f"{found['peak_rss_gib']:.2f} GiB with a budget of {args.budget:g} GiB "
            f"({found['rss_over_budget_gib']:+.2f}); none lost by a kill",
            flush=True,
        )
    if args.part != "big":
        results |= flat(args.output, args.root)
    if args.json:
        print(json.dumps(results | {"threads": torch.get_num_threads()}))


def flat(output: str | None, root: str) -> dict[str, object]:
    seconds, rss = {}, {}
    print(f"{'clients':>9} {'a round':>9} {'peak RSS':>10}")
    for num_clients in SIZES:
        with tempfile.TemporaryDirectory(dir=output) as folder:
            found = measure_flat(Path(folder), root, num_clients)
        seconds[num_clients], rss[num_clients] = found["seconds_per_round"], found["rss_gib"]
        print(
            f"{num_clients:9,} {seconds[num_clients]:7.3f} s {rss[num_clients]:6.2f} GiB",
            flush=True,
        )
    return {
        "seconds_per_round": seconds,
        "rss_gib": rss,
        "flat_ratio": seconds[SIZES[-1]] / seconds[SIZES[0]],
        "flat_rss_ratio": rss[SIZES[-1]] / rss[SIZES[0]],
    }


if __name__ == "__main__":
    main()
