"""Rounds per second on pfl-research's CIFAR-10 benchmark: ours, pfl-research's and Flower's.

    python benchmarks/rivals.py --pfl-python PYTHON --flower-python PYTHON
        [--root ../shared/data] [--rounds 100] [--json] [key=value ...]

The rivals run in environments of their own (requirements-frameworks.txt). All three get the same
pictures, clients, network, initial weights, batch size, learning rate and two cores; each samples
its cohorts itself. Ours is configs/pfl_benchmark.yaml as a user starts it: torchrun, two ranks of
one thread, precision `auto`, every message really encoded; between the ranks sums are added up, as
pfl-research does.

Of a rival each setting does a few rounds. The fastest of the published ones (fp32, its network as
it stands, channels first) does the run. `tuned` are settings that have what ours has: the cheaper
order of layers, channels last, and bf16. They show what is ours and what is the framework's.

A round's seconds are the median after two rounds of warm-up, without evaluation and start-up. Ours
are `wall_seconds` of rounds.jsonl, theirs from the end of one round to the end of the next. The
accuracy is that of the last model, all by the same function in fp32. `--rounds 12` is for speed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from cnn_model import FlatModel, build_network
from command_line import load_config
from config import Config
from data import Dataset, Pictures, load_dataset, partition_labels
from training.evaluation import evaluate

ROOT = Path(__file__).parent.parent
CONFIG = "configs/pfl_benchmark.yaml"
CORES = 2
WARM_UP = 2  # rounds
TRIAL = 9  # rounds of each setting of a rival, with the warm-up
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(CORES)]
# processes, precision, style of the network (see rival_task.py)
PUBLISHED = [(1, "fp32", "published"), (CORES, "fp32", "published")]
TUNED = [(1, "bf16", "ours"), (CORES, "bf16", "ours")]
EVERYBODY = {
    "OMP_WAIT_POLICY": "PASSIVE",  # as main.py sets
    "RAY_worker_niceness": "0",  # Ray's own 15 starves Flower's workers on a busy machine
    "PYTHONWARNINGS": "ignore",
}


def launch(command: list, processes: int) -> str:
    """Run a command on all cores, shared by `processes`; return what it printed."""
    environment = os.environ | EVERYBODY | {"OMP_NUM_THREADS": str(CORES // processes)}
    command = [str(word) for word in command]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        tail = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        raise SystemExit(f"error: {' '.join(command)}\n{tail}")
    return done.stdout


def write_task(config: Config, data: Dataset, network: torch.nn.Module, file: Path) -> None:
    """The task for the rivals, see rival_task.py."""
    partition, clients = config.data.partition, config.clients
    labels = data.train_labels.numpy()
    seed = config.seed_for("partition")
    shards = partition_labels(labels, clients.total, partition.name, partition.args, seed)
    # A shard comes sorted by class, and pfl-research does not shuffle: unmixed batches learn badly.
    shards = [np.random.default_rng(i).permutation(shard) for i, shard in enumerate(shards)]
    np.savez(
        file,
        images=data.train_images.numpy(),
        labels=labels,
        clients=np.concatenate(shards),
        sizes=[len(shard) for shard in shards],
        initial=parameters_to_vector(network.parameters()).detach().numpy(),
        num_classes=len(data.class_names),
        cohort=clients.per_round,
        batch_size=config.local.batch_size,
        lr=config.local.lr,
    )


def run_ours(words: list[str], rounds: int, folder: Path) -> dict:
    """`seconds` of the rounds, final `weights`, and the `setting` that `auto` took."""
    words = [*words, f"rounds={rounds}", f"evaluation.every={rounds}", f"output_dir={folder}"]
    launch([sys.executable, *TORCHRUN, "main.py", "--config", CONFIG, *words], CORES)
    (run,) = folder.glob("*-s*")
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return {
        "seconds": [row["wall_seconds"] for row in rows if row["test_accuracy"] is None],
        "weights": torch.load(run / "checkpoint.pt")["parameters"],
        "setting": (CORES, json.loads((run / "environment.json").read_text())["precision"], "ours"),
    }


def run_rival(name: str, python: str, setting: tuple, task: Path, rounds: int) -> dict:
    """`seconds` of the rounds, final `weights`, and the `setting`."""
    (processes, precision, style), weights = setting, task.with_suffix(".npy")
    words = [ROOT / f"benchmarks/{name}_rival.py", task, rounds, precision, style, weights]
    if name == "flower":
        command = [python, *words, processes, CORES // processes]
    else:
        command = [python, *(TORCHRUN if processes > 1 else []), *words]
    printed = launch(command, processes)
    seconds = json.loads(printed.splitlines()[-1])["seconds"]
    return {
        "seconds": seconds,
        "weights": torch.from_numpy(np.load(weights)),
        "setting": setting,
    }


def run_fastest(name: str, python: str, task: Path, rounds: int) -> dict:
    """The run of the fastest published setting, and what each setting took in its trial."""
    trials = {}
    for setting in PUBLISHED + TUNED:
        trials[setting] = per_round(run_rival(name, python, setting, task, TRIAL))
        print(f"{name}, {describe(setting)}: {trials[setting]:.2f} s a round", flush=True)
    run = run_rival(name, python, min(PUBLISHED, key=trials.get), task, rounds)
    tuned = min(trials[setting] for setting in TUNED)
    return run | {"trials": {describe(s): t for s, t in trials.items()}, "tuned": tuned}


def per_round(run: dict) -> float:
    return statistics.median(run["seconds"][WARM_UP:])


def describe(setting: tuple) -> str:
    processes, precision, style = setting
    return f"{processes} x {CORES // processes} threads, {precision}, network {style}"


def accuracy(network: torch.nn.Module, weights: torch.Tensor, pictures: Pictures) -> float:
    """Of the test pictures, in fp32. weights: float32 [num_parameters]."""
    vector_to_parameters(weights, network.parameters())
    model, total = FlatModel(network, torch.device("cpu")), len(pictures.labels["test"])
    parts = [evaluate(model, pictures, "fp32", "test", s, s + 1000) for s in range(0, total, 1000)]
    return sum(sum(right) for right, _ in parts) / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pfl-python", metavar="PYTHON", help="an environment that has pfl")
    parser.add_argument("--flower-python", metavar="PYTHON", help="one that has flwr[simulation]")
    parser.add_argument("--root", default="../shared/data", help="where CIFAR-10 is")
    parser.add_argument("--rounds", type=int, default=100, help=f"more than {WARM_UP + 1}")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    words = [f"data.root={args.root}", "device=cpu", "distributed.exchange=allreduce"]
    words += args.overrides
    config = load_config(ROOT / CONFIG, words)
    data = load_dataset(config.data.name, config.data.root, config.data.fallback)
    pictures = Pictures(data, torch.device("cpu"), padding=0, flip=False)
    size, seed = (pictures.num_classes, pictures.image_size), config.seed_for("network")
    network = build_network(config.model.name, *size, seed)
    pythons = {"pfl": args.pfl_python, "flower": args.flower_python}
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.npz"
        write_task(config, data, network, task)
        runs = {"ours": run_ours(words, args.rounds, Path(folder) / "ours")}
        for name, python in pythons.items():
            if python:
                runs[name] = run_fastest(name, python, task, args.rounds)
    found = {}
    print(f"\n{'':8} {'s a round':>9} {'ours is':>8} {'accuracy':>9}  after {args.rounds} rounds")
    for name, run in runs.items():
        seconds, score = per_round(run), accuracy(network, run["weights"], pictures)
        faster = seconds / per_round(runs["ours"])
        found[name] = {"seconds": seconds, "accuracy": score, "setting": describe(run["setting"])}
        found[name]["trials"] = run.get("trials")
        print(f"{name:8} {seconds:9.2f} {faster:7.2f}x {score:9.2%}  {found[name]['setting']}")
    for name, python in pythons.items():
        if python:
            tuned, ours = runs[name]["tuned"], found["ours"]["seconds"]
            print(f"{name} tuned: {tuned:.2f} s a round, {tuned / ours:.2f}x")
        else:
            print(f"{name} did NOT run: give --{name}-python, see requirements-frameworks.txt")
    if args.json:
        ratios = dict.fromkeys(f"ours_vs_{name}{end}" for name in pythons for end in ("", "_tuned"))
        for name in runs.keys() - {"ours"}:
            ratios[f"ours_vs_{name}"] = found[name]["seconds"] / found["ours"]["seconds"]
            ratios[f"ours_vs_{name}_tuned"] = runs[name]["tuned"] / found["ours"]["seconds"]
        print(json.dumps(ratios | {"rounds": args.rounds, "systems": found}))


if __name__ == "__main__":
    main()
