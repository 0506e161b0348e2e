"""What an average of compressed updates is off by, beside what clients have in common.

    python benchmarks/noise.py [--root ../shared/data] [--rounds 20,60] [--json] [key=value ...]

A run of configs/codecs_cifar10.yaml, with the overrides, trains without compression. From each of
the given rounds on, the updates of WINDOW rounds are looked at. With weights w_i that add up to 1
in a round, updates d_i and what arrives of them, c_i, the columns are means over these rounds:

    square / common   sum of w_i |d_i|^2, over the square of what all clients have in common. The
                      latter is estimated without bias, by products of two clients' updates.
    budget: equal     |sum of w_i (c_i - d_i)|^2 / |sum of w_i d_i|^2 where all clients send alike
    budget: weights   the same where they send in proportion to their weights, as a budget does
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as main.py does

import numpy as np
import torch
from devices import device_name
from torch import Tensor
from updates import watch

from command_line import load_config
from config import Config, Server
from distributed import Ranks
from experiment import resolve_auto
from federation.agreement import Agreement
from federation.densities import fit_to_budget
from federation.federation import Federation
from federation.schedules import make_schedule

CONFIG = Path("configs/codecs_cifar10.yaml")
BUDGETS = ("100x", "300x", "1000x")
WINDOW = 5  # rounds: their models differ little
Seen = list[tuple[int, Tensor]]  # client, its update
Cohort = tuple[list[int], np.ndarray, Tensor]  # clients, weights [n], updates float32 [n, size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", default="../shared/data", help="where CIFAR-10 is")
    parser.add_argument("--rounds", default="20,60", help="where to look, by commas")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    rounds = map(int, args.rounds.split(","))
    with tempfile.TemporaryDirectory() as output:
        fixed = [f"data.root={args.root}", f"output_dir={output}", "trackers=[]"]
        fixed += ["evaluation.every=999999", "checkpoint.every=999999"]
        config = load_config(CONFIG, [*fixed, *args.overrides])
        federation = make_schedule(config, Ranks(config), Path(output) / "states")
        resolve_auto(federation, {})
        print(f"{device_name(federation.ranks.device)}; overrides: {args.overrides}")
        seen = watch(federation.clients.agreement.channel("up", "update"))
        found = {first: measure(federation, seen, first) for first in sorted(rounds)}
    names = list(next(iter(found.values())))
    print("round " + " ".join(f"{name:>15}" for name in names))
    for first, row in found.items():
        print(f"{first:5} " + " ".join(f"{row[name]:15.3f}" for name in names))
    if args.json:
        print(json.dumps(found))


def measure(federation: Federation, seen: Seen, first: int) -> dict[str, float]:
    """The columns of one line: train until before that round, and look at the next ones."""
    while federation.progress.round_number + 1 < first:
        cohort(federation, seen)
    cohorts = [cohort(federation, seen) for _ in range(WINDOW)]
    squares, commons = map(square, cohorts), map(common, cohorts)
    row = {"square / common": sum(squares) / sum(commons)}
    for budget in BUDGETS:
        for name, weighting in {"equal": "uniform", "weights": "examples"}.items():
            agreement = of_budget(federation, budget, weighting)
            row[f"{budget}: {name}"] = np.mean([off_by(agreement, c) for c in cohorts])
    return {name: float(figure) for name, figure in row.items()}


def cohort(federation: Federation, seen: Seen) -> Cohort:
    """Do a round; return who took part, and what they learned."""
    seen.clear()
    federation.run_round()
    clients, updates = zip(*seen, strict=True)
    weights = federation.num_examples[list(clients)].astype(float)
    return list(clients), weights / weights.sum(), torch.stack(updates).cpu()


def of_budget(federation: Federation, budget: str, weighting: str) -> Agreement:
    """How updates travel for this budget, if clients weigh so."""
    config: Config = federation.config
    uplink = replace(config.uplink, budget=budget)
    config = replace(config, uplink=uplink, server=Server(weighting=weighting))
    layout, buffers = federation.model.layout, federation.model.buffer_layout
    fitted = fit_to_budget(config, layout.size, buffers.size, federation.num_examples)
    return Agreement(fitted, layout, buffers)


def square(cohort: Cohort) -> float:
    _, weights, updates = cohort
    return float(weights @ updates.double().square().sum(1).numpy())


def common(cohort: Cohort) -> float:
    """The square of the clients' expected update: the mean of w_i w_j d_i d_j over i != j."""
    _, weights, updates = cohort
    products = (updates.double() @ updates.double().T).numpy()
    pairs = np.outer(weights, weights)
    np.fill_diagonal(pairs, 0.0)
    return float((pairs * products).sum() / pairs.sum())


def off_by(agreement: Agreement, cohort: Cohort) -> float:
    channel = agreement.channel("up", "update")
    error, mean = torch.zeros(channel.layout.size), torch.zeros(channel.layout.size)
    for client, weight, update in zip(*cohort, strict=True):
        _, arrives = channel.encode(update.clone(), 1, client)
        arrives.add_to(error, weight)
        error.sub_(update, alpha=weight)
        mean.add_(update, alpha=weight)
    return float(error.square().sum() / mean.square().sum())


if __name__ == "__main__":
    main()
