"""What the federation costs on top of training: seconds per round over those of a bare loop.

    python benchmarks/engine.py [--root ../shared/data] [--rounds 5] [--json]

Both train the same clients on the same batches at the same precision, threads and device, in turn,
in one process. The bare loop is what a student would write: plain modules, torch.optim.SGD, an
average of state dicts. Neither evaluates or writes checkpoints. The figure is the median over
rounds of ours / bare. `ratio` is that of the worst dense case, where both do the same work: train,
encode or copy the whole model, average. The other rows show what pruning, coding and residuals add,
which the bare loop does not do; `ratio_topk` is that of the worst case with top-k 1%. On a GPU the
bare loop is eager, kernel by kernel, and both are waited for before a clock is read.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as main.py does

import numpy as np
import torch
from devices import device_name, wait_for
from torch.nn.functional import cross_entropy

from cnn_model import Dropout, build_network
from command_line import load_config
from config import Config
from distributed import Ranks
from experiment import resolve_auto
from federation.cohort import sample_cohort
from federation.federation import Federation
from federation.schedules import make_schedule
from training.draws import Draws
from training.engines import autocast
from training.local_sgd import batch_sizes, local_lr

TRACKED = ["model.norm_policy=average"]  # as in the bare loop
# The cohort is a part of the config's, to keep a round short; a client's work is whole.
CASES = {
    "pfl benchmark, dense": ("configs/pfl_benchmark.yaml", ["clients.per_round=20"]),
    "pfl benchmark, top-k 1% int8": (
        "configs/pfl_benchmark.yaml",
        [
            "clients.per_round=20",
            "pruning.method=topk",
            "uplink.values=int8",
            "uplink.error_feedback=true",
        ],
    ),
    "ResNet-18, dense": (
        "configs/baseline_fedavg.yaml",
        ["clients.per_round=2", "local.steps=8", *TRACKED],
    ),
    "ResNet-18, top-k 1% int8": (
        "configs/cifar10_resnet18.yaml",
        ["clients.per_round=2", "local.steps=8", *TRACKED],
    ),
    "ResNet-18, a step a round, DGC": ("configs/presets/dgc_cifar10.yaml", ["pruning.warmup=[]"]),
}


class BareLoop:
    """FedAvg in plain PyTorch over the clients, pictures and settings of a Federation."""

    def __init__(self, federation: Federation):
        self.config, self.pictures = federation.config, federation.pictures
        self.federation, model = federation, federation.config.model
        self.network = build_network(
            model.name, self.pictures.num_classes, self.pictures.image_size, 0, norm=model.norm
        )
        self.network.to(federation.ranks.device, memory_format=torch.channels_last)
        self.dropouts = [m for m in self.network.modules() if isinstance(m, Dropout)]
        self.state = {k: v.clone() for k, v in self.network.state_dict().items()}

    def run_round(self, round_number: int) -> None:
        clients = sample_cohort(self.config, self.federation.candidates, round_number)
        mean = {k: torch.zeros_like(v, dtype=torch.float32) for k, v in self.state.items()}
        for client in clients:
            self.network.load_state_dict(self.state)
            self.train(round_number, self.federation.shards[client])
            for key, value in self.network.state_dict().items():
                mean[key] += value / len(clients)
        self.state = {k: v.to(self.state[k].dtype) for k, v in mean.items()}

    def train(self, round_number: int, indices: np.ndarray) -> None:
        local, device = self.config.local, self.federation.ranks.device
        generator = torch.Generator(device).manual_seed(round_number)
        optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=local_lr(local, round_number, self.config.rounds),
            momentum=local.momentum,
            weight_decay=local.weight_decay,
        )
        mine, start = torch.from_numpy(indices).to(device), 0
        self.network.train()
        for size in batch_sizes(local, len(indices)):
            if start % len(mine) == 0:  # another epoch
                order = torch.randperm(len(mine), generator=generator, device=device)
                shuffled, start = mine[order], 0
            draws = Draws.from_seed(round_number, device).at(start)
            for layer in self.dropouts:
                layer.draws = draws
            images, labels = self.pictures.train_batch(shuffled[start : start + size], draws)
            start += size
            optimizer.zero_grad()
            with autocast(device, self.federation.clients.choices.precision):
                loss = cross_entropy(self.network(images), labels)
            loss.backward()
            optimizer.step()


def measure(config: Config, rounds: int) -> dict[str, float | str]:
    """Median seconds of a round of ours and of the bare loop, and the median of their ratios.

    And how the clients were trained: the choices that a run would record.
    """
    federation = make_schedule(config, Ranks(config), Path(config.output_dir) / "states")
    resolve_auto(federation, {})
    bare, device = BareLoop(federation), federation.ranks.device
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    for round_number in range(1, rounds + 2):
        turns = [("ours", federation.run_round), ("bare", lambda n=round_number: bare.run_round(n))]
        for name, work in turns if round_number % 2 else reversed(turns):
            wait_for(device)
            start = time.perf_counter()
            work()
            wait_for(device)
            seconds[name].append(time.perf_counter() - start)
    ours, loop = seconds["ours"][1:], seconds["bare"][1:]  # the first round warms up
    return {
        "ours_seconds": statistics.median(ours),
        "bare_seconds": statistics.median(loop),
        "ratio": statistics.median(a / b for a, b in zip(ours, loop, strict=True)),
        **vars(federation.clients.choices),
    }


def in_json(results: dict[str, dict], device: torch.device) -> str:
    """The cases that are done, and of each kind the largest ratio, if there is one yet."""
    facts = {"device": device_name(device), "threads": torch.get_num_threads()}
    for key, kind in (("ratio", "dense"), ("ratio_topk", "top-k")):
        ratios = [found["ratio"] for name, found in results.items() if kind in name]
        facts |= {key: max(ratios)} if ratios else {}
    return json.dumps(facts | {"cases": results})


def main() -> None:
    parser = argparse.ArgumentParser(description="Our round against a bare PyTorch loop.")
    parser.add_argument("--root", default="../shared/data", help="where CIFAR-10 is")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds a case")
    parser.add_argument(
        "--json", action="store_true", help="end with one JSON object, of each case anew"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    results = {}
    device = Ranks(load_config(Path("configs/default.yaml"), args.overrides)).device
    print(f"device: {device_name(device)}, {torch.get_num_threads()} threads")
    print(f"{'case':32} {'ours':>9} {'bare':>9} {'ratio':>7}")
    for name, (path, settings) in CASES.items():
        with tempfile.TemporaryDirectory() as output:
            fixed = [f"data.root={args.root}", f"output_dir={output}", "trackers=[]"]
            fixed += ["rounds=1000000", "evaluation.every=999999", "checkpoint.every=999999"]
            config = load_config(Path(path), [*settings, *fixed, *args.overrides])
            found = results[name] = measure(config, args.rounds)
        print(
            f"{name:32} {found['ours_seconds']:7.3f} s {found['bare_seconds']:7.3f} s "
            f"{found['ratio']:7.3f}",
            flush=True,
        )
        if args.json:  # after each case, in case the next one is cut off
            print(in_json(results, device), flush=True)


if __name__ == "__main__":
    main()
