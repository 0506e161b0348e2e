"""What a hundred thousand clients cost beside a hundred: seconds per round, and memory per client.

    python benchmarks/scale.py [--clients 100000] [--rounds 8] [--json] [key=value ...]

Both federations sample equal cohorts of clients with equally many pictures, which train equally
long; every client has a link, a device and an availability of its own, and owes what compression
lost of its updates. The pictures are made up, four for each client. What grows with the number of
clients is the planning of a round: who is there, who is sampled, when their messages arrive.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as main.py does

import numpy as np
import torch
from devices import device_name

from command_line import load_config
from data import Dataset, datasets
from distributed import Ranks
from federation.schedules import make_schedule

CPU = torch.device("cpu")
PER_CLIENT = 4  # pictures
WORDS = ["data.name=made", "data.fallback=", "data.padding=0", "trackers=[]", "model.name=cnn"]
WORDS += ["clients.per_round=20", "local.batch_size=4", "local.steps=25", "local.lr=0.01"]
WORDS += ["pruning.density=0.01", "uplink.values=int8", "uplink.error_feedback=true"]
WORDS += ["network.links={3g: 0.2, 4g: 0.6, wifi: 0.2}", "network.devices={phone: 1.0}"]
WORDS += ["network.availability.name=diurnal", "rounds=1000000", "evaluation.every=999999"]
WORDS += [
    "clients.state_memory_gib=0.5",
    "schedule.over_selection=1.25",
    "precision=fp32",
    "device=cpu",
]


def make_pictures(num_clients: int) -> Dataset:
    """Four pictures of 16x16 for each client, and a hundred to test with."""
    rng, count = np.random.default_rng(0), PER_CLIENT * num_clients + 100
    images = rng.integers(0, 256, (count, 16, 16, 3), np.uint8)
    labels = rng.integers(0, 10, count)
    return Dataset.from_arrays("made", images, labels, count - 100, map(str, range(10)))


def measure(num_clients: int, rounds: int, overrides: list[str]) -> dict[str, float]:
    """Median seconds of a round, seconds to start, and bytes of memory that the start took."""
    datasets.LOADERS["made"] = lambda *_: make_pictures(num_clients)
    with tempfile.TemporaryDirectory() as output:
        words = [*WORDS, f"output_dir={output}", f"clients.total={num_clients}", *overrides]
        config = load_config(Path("configs/default.yaml"), words)
        before, begin = _memory(), time.perf_counter()
        federation = make_schedule(config, Ranks(config), Path(output) / "states")
        started, taken = time.perf_counter() - begin, _memory() - before
        seconds = []
        for _ in range(rounds + 1):
            begin = time.perf_counter()
            federation.run_round()
            seconds.append(time.perf_counter() - begin)
    return {
        "seconds": statistics.median(seconds[1:]),  # the first round warms up
        "start_seconds": started,
        "bytes": taken,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def _memory() -> int:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description="Many clients beside a hundred.")
    parser.add_argument("--clients", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=8, help="measured rounds of each")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    print(f"{device_name(CPU)}\n{'clients':>9} {'a round':>9} {'start':>9} {'memory':>10}")
    found = {}
    for num_clients in (100, args.clients, 100, args.clients):  # in turn: machines are noisy
        result = measure(num_clients, args.rounds, args.overrides)
        best = found.setdefault(num_clients, result)
        best["seconds"] = min(best["seconds"], result["seconds"])
        print(
            f"{num_clients:9,} {result['seconds']:7.3f} s {result['start_seconds']:7.2f} s "
            f"{result['bytes'] / 2**20:6.0f} MiB",
            flush=True,
        )
    few, many = found[100], found[args.clients]
    ratio = many["seconds"] / few["seconds"]
    per_client = (many["bytes"] - few["bytes"]) / (args.clients - 100)
    print(f"ratio {ratio:.3f}; {per_client:.0f} bytes a client, 3072 of them its pictures")
    if args.json:
        found = {"seconds_100k_over_100": ratio, "bytes_per_client": per_client}
        print(json.dumps(found | {"device": device_name(CPU)}))


if __name__ == "__main__":
    main()
