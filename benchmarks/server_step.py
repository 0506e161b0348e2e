"""What the server's step costs over moving its vectors once.

    python benchmarks/server_step.py [--size 11173962] [--repeats 15] [--json]

All optimizers of afo.py step one float32 vector, ResNet-18's unless --size says otherwise, in turn
in one loop with two ways to move bytes: a compiled loop that reads four vectors and writes three,
as FedYogi must, and torch's copies on all its threads. A ratio is the median over repeats of a step
over the time of moving the vectors that this optimizer must read or write, each counted once.
`ratio` is FedYogi's over the faster of the two ways.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as main.py does

import torch

from afo import OURS, make_optimizer
from compiled import compiled

# Vectors read and written: x twice, the gradient, each moment twice; FedExP needs ||gradient||
# before it can step.
MOVED = {
    "FedAvg": 3,
    "FedAvgM": 5,
    "FedExP": 4,
    "FedAdagrad": 7,
    "FedAdam": 7,
    "FedAMS": 9,
    "FedYogi": 7,
}


@compiled
def move_seven(x, gradient, m, v):
    for i in range(len(x)):
        x[i] += gradient[i]
        m[i] += gradient[i]
        v[i] += gradient[i]


def measure(size: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each turn, by name."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.Parameter(torch.randn(size, generator=generator))
    x.grad = 1e-3 * torch.randn(size, generator=generator)
    m, v = torch.zeros(size), torch.zeros(size)
    arrays = [vector.numpy() for vector in (x.detach(), x.grad, m, v)]
    turns: dict[str, Callable[[], object]] = {
        "compiled": lambda: move_seven(*arrays),
        "copies": lambda: v.copy_(m),
    }
    turns |= {name: make_optimizer(name, x).step for name in OURS}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(repeats + 1):
        for name, work in turns.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}  # the first repeat warms up


def ratio(seconds: dict[str, list[float]], name: str, way: str) -> float:
    """Over moving the same number of vectors: 7 by the compiled loop, 2 by a copy."""
    share = MOVED[name] / {"compiled": 7, "copies": 2}[way]
    pairs = zip(seconds[name], seconds[way], strict=True)
    return statistics.median(step / (share * moving) for step, moving in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description="The server's step against moving its bytes.")
    parser.add_argument("--size", type=int, default=11_173_962, help="values in the vector")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    args = parser.parse_args()
    seconds = measure(args.size, args.repeats)
    rows = {}
    print(f"{args.size:,} values, {torch.get_num_threads()} threads")
    print(f"{'optimizer':12} {'ms':>8} {'vectors':>8} {'/ compiled':>11} {'/ copies':>9}")
    for name in OURS:
        row = rows[name] = {"ms": 1e3 * statistics.median(seconds[name]), "vectors": MOVED[name]}
        row |= {way: ratio(seconds, name, way) for way in ("compiled", "copies")}
        print(
            f"{name:12} {row['ms']:8.2f} {row['vectors']:8} {row['compiled']:11.2f} "
            f"{row['copies']:9.2f}"
        )
    if args.json:
        worst = max(rows["FedYogi"]["compiled"], rows["FedYogi"]["copies"])
        print(json.dumps({"ratio": worst, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
