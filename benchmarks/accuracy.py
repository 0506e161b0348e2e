"""Accuracy against measured bytes: the codecs on one task, several seeds each.

    python benchmarks/accuracy.py [key=value ...] [--rows dense topk1-ef ...] [--seeds 1 2 3]

Each run is `python main.py --config configs/codecs_cifar10.yaml` with the overrides of its row. One
that was killed goes on and one that is finished is read, so the command can be given again. Ends
with a table in Markdown: mean and standard deviation over the seeds; --json adds it as one line.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "codecs_cifar10.yaml"
INT8 = ["pruning.method=topk", "uplink.values=int8"]
OWED = "uplink.error_feedback=true"
ROWS = {  # what travels: the overrides
    "dense": [],
    "fp16": ["uplink.values=fp16"],
    "int8": ["uplink.values=int8"],
    "topk10": [*INT8, "pruning.density=0.1"],
    "topk10-ef": [*INT8, "pruning.density=0.1", OWED],
    "topk1": [*INT8, "pruning.density=0.01"],
    "topk1-ef": [*INT8, "pruning.density=0.01", OWED],
    "topk0.1": [*INT8, "pruning.density=0.001"],
    "topk0.1-ef": [*INT8, "pruning.density=0.001", OWED],
    "stc1": ["pruning.method=topk", "pruning.density=0.01", "uplink.values=ternary", OWED],
    "eden1": ["uplink.values=eden1"],
    "eden2": ["uplink.values=eden2"],
    "snip10": ["pruning.mask.method=snip", "pruning.mask.density=0.1"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--json", action="store_true", help="end with the table as one JSON line")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args()
    table = {}
    for row in given.rows:
        runs = [run(row, seed, given.overrides) for seed in given.seeds]
        table[row] = summarise(runs)
        print(f"{row}: {table[row]}", file=sys.stderr, flush=True)
    print(markdown(table))
    if given.json:
        print(json.dumps(table))


def run(row: str, seed: int, overrides: list[str]) -> dict:
    """Do one run, or what is left of it; return its summary."""
    words = [f"name=codecs-{row}", f"seed={seed}", "trackers=[]", *ROWS[row], *overrides]
    subprocess.run([sys.executable, "main.py", "--config", CONFIG, *words], cwd=ROOT, check=True)
    output = next((w.partition("=")[2] for w in words if w.startswith("output_dir=")), None)
    folder = ROOT / (output or "outputFolder") / f"codecs-{row}-s{seed}"
    return json.loads((folder / "summary.json").read_text())


def summarise(runs: list[dict]) -> dict[str, float]:
    """Accuracies are means of a run's last evaluations; bytes are means over the seeds."""
    accuracies = [run["test_accuracy_mean"] for run in runs]
    return {
        "accuracy": mean(accuracies),
        "std": stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "mb_up": mean(run["bytes_up"] for run in runs) / 1e6,
        "mb_down": mean(run["bytes_down"] for run in runs) / 1e6,
        "dense_over_up": sum(r["dense_bytes_up"] for r in runs) / sum(r["bytes_up"] for r in runs),
    }


def markdown(table: dict[str, dict[str, float]]) -> str:
    lines = ["| what travels | test accuracy | MB up | less than dense | MB down |"]
    lines += ["|---|---|---|---|---|"]
    lines += [
        f"| {row} | {100 * t['accuracy']:.2f} ± {100 * t['std']:.2f} | {t['mb_up']:,.2f} "
        f"| {t['dense_over_up']:,.1f} | {t['mb_down']:,.1f} |"
        for row, t in table.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
