"""Rounds per second on pfl-research's CIFAR-10 benchmark: ours, pfl-research's and Flower's.

    python benchmarks/rivals.py --pfl-python PYTHON --flower-python PYTHON
        [--root ../shared/data] [--rounds 100] [--json] [key=value ...]

The rivals run in environments of their own (requirements-frameworks.txt). All three get the same
pictures, clients, network, initial weights, batch size, learning rate and device; each samples its
cohorts itself. Ours is configs/pfl_benchmark.yaml as a user starts it: precision `auto`, every
message really encoded. On a CPU everybody gets two cores, and ours is torchrun with two ranks of
one thread, between which sums are added up, as pfl-research does. On a GPU (device=cpu leaves it
alone) ours is one process, and the rivals share the GPU among one process or five.

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
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from devices import device_name
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from cnn_model import build_network
from command_line import load_config
from config import Config
from data import Dataset, Pictures, load_dataset, partition_labels
from training.evaluation import evaluate
from training.flat_model import FlatModel

ROOT = Path(__file__).parent.parent
CONFIG = "configs/pfl_benchmark.yaml"
RIVALS = ("pfl", "flower")
WARM_UP = 2  # rounds
TRIAL = 9  # rounds of each setting of a rival, with the warm-up
EVERYBODY = {
    "OMP_WAIT_POLICY": "PASSIVE",  # as main.py sets
    "RAY_worker_niceness": "0",  # Ray's own 15 starves Flower's workers on a busy machine
    "PYTHONWARNINGS": "ignore",
}
Setting = tuple[int, str, str]  # processes, precision, style of the network (see rival_task.py)


@dataclass(frozen=True)
class Machine:
    """What everybody gets: a device and cores, which the processes share."""

    device: str
    cores: int
    ours: int  # processes
    theirs: tuple[int, int]  # numbers of processes that a rival tries

    @property
    def published(self) -> list[Setting]:
        return [(processes, "fp32", "published") for processes in self.theirs]

    @property
    def tuned(self) -> list[Setting]:
        return [(processes, "bf16", "ours") for processes in self.theirs]

    def threads(self, processes: int) -> int:
        return max(1, self.cores // processes)

    def describe(self, setting: Setting) -> str:
        processes, precision, style = setting
        return f"{processes} x {self.threads(processes)} threads, {precision}, network {style}"

    def launch(self, command: list, processes: int) -> str:
        """Run a command whose `processes` share the machine; return what it printed."""
        environment = os.environ | EVERYBODY | {"OMP_NUM_THREADS": str(self.threads(processes))}
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [str(word) for word in command]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            tail = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            raise SystemExit(f"error: {' '.join(command)}\n{tail}")
        return done.stdout


CPU = Machine("cpu", cores=2, ours=2, theirs=(1, 2))
GPU = Machine("cuda", cores=os.cpu_count() or 1, ours=1, theirs=(1, 5))


def torchrun(processes: int) -> list[str]:
    """The words between python and a script that start so many processes of it."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return words if processes > 1 else []


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


def our_words(machine: Machine, root: str, overrides: list[str]) -> list[str]:
    """What the command line says of the config."""
    words = [f"data.root={root}", f"device={machine.device}"]
    if machine.ours > 1:
        words.append("distributed.exchange=allreduce")
    return [*words, *overrides]


def run_ours(machine: Machine, words: list[str], rounds: int, folder: Path) -> dict:
    """`seconds` of the rounds, final `weights`, and the `setting` that `auto` took."""
    words = [*words, f"rounds={rounds}", f"evaluation.every={rounds}", f"output_dir={folder}"]
    command = [sys.executable, *torchrun(machine.ours), "main.py", "--config", CONFIG, *words]
    machine.launch(command, machine.ours)
    (run,) = folder.glob("*-s*")
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    precision = json.loads((run / "environment.json").read_text())["precision"]
    return {
        "seconds": [row["wall_seconds"] for row in rows if row["test_accuracy"] is None],
        "weights": torch.load(run / "checkpoint.pt", map_location="cpu")["parameters"],
        "setting": (machine.ours, precision, "ours"),
    }


def rival_command(
    machine: Machine, name: str, python: str, setting: Setting, task: Path, rounds: int
) -> list:
    """The rival's script leaves its final weights beside the task, in a file that ends in .npy."""
    processes, precision, style = setting
    script = ROOT / f"benchmarks/{name}_rival.py"
    words = [script, task, rounds, precision, style, task.with_suffix(".npy")]
    if name == "flower":  # Ray starts its processes
        return [python, *words, processes, machine.threads(processes)]
    return [python, *torchrun(processes), *words]


def run_rival(
    machine: Machine, name: str, python: str, setting: Setting, task: Path, rounds: int
) -> dict:
    """`seconds` of the rounds, final `weights`, and the `setting`."""
    command = rival_command(machine, name, python, setting, task, rounds)
    seconds = json.loads(machine.launch(command, setting[0]).splitlines()[-1])["seconds"]
    weights = torch.from_numpy(np.load(task.with_suffix(".npy")))
    return {"seconds": seconds, "weights": weights, "setting": setting}


def run_fastest(machine: Machine, name: str, python: str, task: Path, rounds: int) -> dict:
    """The run of the fastest published setting, and what each setting took in its trial."""
    trials = {}
    for setting in machine.published + machine.tuned:
        trials[setting] = per_round(run_rival(machine, name, python, setting, task, TRIAL))
        print(f"{name}, {machine.describe(setting)}: {trials[setting]:.3f} s a round", flush=True)
    run = run_rival(machine, name, python, min(machine.published, key=trials.get), task, rounds)
    tuned = min(trials[setting] for setting in machine.tuned)
    return run | {"trials": {machine.describe(s): t for s, t in trials.items()}, "tuned": tuned}


def per_round(run: dict) -> float:
    return statistics.median(run["seconds"][WARM_UP:])


def accuracy(network: torch.nn.Module, weights: torch.Tensor, pictures: Pictures) -> float:
    """Of the test pictures, in fp32. weights: float32 [num_parameters]."""
    vector_to_parameters(weights, network.parameters())
    model, total = FlatModel(network, torch.device("cpu")), len(pictures.labels["test"])
    parts = [evaluate(model, pictures, "fp32", "test", s, s + 1000) for s in range(0, total, 1000)]
    return sum(sum(right) for right, _ in parts) / total


def report(machine: Machine, runs: dict[str, dict], scores: dict[str, float]) -> dict:
    """Print a line for each system; return the keys of the JSON that compare ours with others."""
    ours, found = per_round(runs["ours"]), {}
    print(f"\n{'':8} {'s a round':>9} {'ours is':>8} {'accuracy':>9}")
    for name, run in runs.items():
        seconds, setting = per_round(run), machine.describe(run["setting"])
        found[name] = {"seconds": seconds, "accuracy": scores[name], "setting": setting}
        found[name]["trials"] = run.get("trials")
        print(f"{name:8} {seconds:9.3f} {seconds / ours:7.2f}x {scores[name]:9.2%}  {setting}")
    ratios = {}
    for name in RIVALS:
        compared = {f"ours_vs_{name}": None, f"ours_vs_{name}_tuned": None}
        if name in runs:
            tuned = runs[name]["tuned"]
            print(f"{name} tuned: {tuned:.3f} s a round, {tuned / ours:.2f}x")
            values = found[name]["seconds"] / ours, tuned / ours
            compared = dict(zip(compared, values, strict=True))
        else:
            print(f"{name} did NOT run: give --{name}-python, see requirements-frameworks.txt")
        ratios |= compared
    return ratios | {"systems": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pfl-python", metavar="PYTHON", help="an environment that has pfl")
    parser.add_argument("--flower-python", metavar="PYTHON", help="one that has flwr[simulation]")
    parser.add_argument("--root", default="../shared/data", help="where CIFAR-10 is")
    parser.add_argument("--rounds", type=int, default=100, help=f"more than {WARM_UP + 1}")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    on_gpu = torch.cuda.is_available() and "device=cpu" not in args.overrides
    machine = GPU if on_gpu else CPU
    name = device_name(torch.device(machine.device))
    print(f"device: {name}, {machine.cores} cores; {args.rounds} rounds")
    words = our_words(machine, args.root, args.overrides)
    config = load_config(ROOT / CONFIG, words)
    data = load_dataset(config.data.name, config.data.root, config.data.fallback)
    pictures = Pictures(data, torch.device("cpu"), padding=0, flip=False)
    size, seed = (pictures.num_classes, pictures.image_size), config.seed_for("network")
    network = build_network(config.model.name, *size, seed)
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.npz"
        write_task(config, data, network, task)
        runs = {"ours": run_ours(machine, words, args.rounds, Path(folder) / "ours")}
        for rival in RIVALS:
            if python := getattr(args, f"{rival}_python"):
                runs[rival] = run_fastest(machine, rival, python, task, args.rounds)
    scores = {system: accuracy(network, run["weights"], pictures) for system, run in runs.items()}
    found = report(machine, runs, scores)
    if args.json:
        print(json.dumps(found | {"device": name, "rounds": args.rounds}))


if __name__ == "__main__":
    main()
