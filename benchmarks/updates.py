"""Real updates for benchmarks/codec.py: what clients learn while a ResNet trains on CIFAR-10.

    python benchmarks/updates.py [--root ../shared/data] [NAME ...]

Each recipe is a run of the project's own Federation. *dense* sends everything, so its updates are
what local training makes; *feedback* is the default way, top-k 1% with error feedback, so its
updates hold what clients still owe. Of an early, a middle and a late round three vectors are kept,
float32 [num_parameters]: the first client's `update` as it goes to the encoder, the `weights` that
it received, and the `change` of the global model in the round before, which both ends know.

They lie under ~/.cache/federated-bytes/updates and are made once.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as main.py does

import numpy as np
import torch

from command_line import load_config
from distributed import Ranks
from federation.channel import Channel
from federation.federation import Federation
from federation.schedules import make_schedule
from layout import Layout

CACHE = Path.home() / ".cache/federated-bytes/updates"
VECTORS = ("update", "weights", "change")
DENSE = ["pruning.method=none", "uplink.values=fp32"]
EIGHTEEN = ["clients.total=2", "clients.per_round=2", "local.steps=15", "precision=bf16"]
FIFTY = ["clients.total=1", "clients.per_round=1", "local.steps=8", "precision=bf16"]

# name: (config, settings, {name of a moment: its round}).
RECIPES = {
    "resnet18-dense": (
        "configs/cifar10_resnet18.yaml",
        EIGHTEEN + DENSE,
        {"early": 2, "middle": 10, "late": 26},
    ),
    "resnet18-feedback": (
        "configs/cifar10_resnet18.yaml",
        EIGHTEEN,
        {"early": 2, "middle": 10, "late": 26},
    ),
    "resnet50-dense": ("configs/cifar10_resnet50.yaml", FIFTY + DENSE, {"early": 2, "middle": 6}),
}


@dataclass(frozen=True)
class Update:
    """A vector that goes to the encoder, and what both ends know; float32 [layout.size] each."""

    recipe: str
    moment: str  # early, middle or late
    layout: Layout
    update: np.ndarray
    weights: np.ndarray
    change: np.ndarray


def watch(channel: Channel) -> list[tuple[int, torch.Tensor]]:
    """From now on the list gets (client, vector) of all that the channel is about to encode.

    On a GPU this happens on threads, and so in any order.
    """
    seen, encode = [], channel.encode

    def encode_and_keep(vector: torch.Tensor, round_number: int, client: int, *rest):
        seen.append((client, vector.clone()))
        return encode(vector, round_number, client, *rest)

    channel.encode = encode_and_keep
    return seen


def load_updates(name: str, root: str) -> list[Update]:
    """The updates of a recipe, trained now if the cache does not hold them."""
    config, settings, moments = RECIPES[name]
    folder, recipe = CACHE / name, [config, settings, moments]
    made = folder / "made.json"
    if not made.exists() or json.loads(made.read_text())["recipe"] != recipe:
        folder.mkdir(parents=True, exist_ok=True)
        layout = make_updates(name, root, folder)
        made.write_text(json.dumps({"recipe": recipe, "layout": layout}))
    names, shapes = json.loads(made.read_text())["layout"]
    layout = Layout(tuple(names), tuple(map(tuple, shapes)))
    return [
        Update(
            name, moment, layout, *(np.load(folder / f"{moment}-{what}.npy") for what in VECTORS)
        )
        for moment in moments
    ]


def make_updates(name: str, root: str, folder: Path) -> tuple:
    """Train, and write the vectors of each moment as .npy; return the layout's names and shapes."""
    config, settings, moments = RECIPES[name]
    with tempfile.TemporaryDirectory() as output:
        fixed = [f"data.root={root}", f"output_dir={output}", "trackers=[]"]
        fixed += ["evaluation.every=999999", "checkpoint.every=999999"]
        settings = load_config(Path(config), settings + fixed)
        federation = make_schedule(settings, Ranks(settings), Path(output) / "states")
        moment_of = {round_number: moment for moment, round_number in moments.items()}
        for round_number, vectors in rounds(federation, max(moment_of)):
            if round_number in moment_of:
                for what, vector in zip(VECTORS, vectors, strict=True):
                    np.save(folder / f"{moment_of[round_number]}-{what}.npy", vector.cpu().numpy())
    return federation.model.layout.names, federation.model.layout.shapes


def rounds(federation: Federation, last: int) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """Run `last` rounds; yield each one's number and (update, weights, change)."""
    seen = watch(federation.clients.agreement.channel("up", "update"))
    change = torch.zeros_like(federation.server.parameters.detach())
    for round_number in range(1, last + 1):
        seen.clear()
        received = federation.server.parameters.detach().clone()
        row, _ = federation.run_round()
        print(f"round {round_number}/{last}, training loss {row['train_loss']:.3f}", flush=True)
        _, first = min(seen, key=lambda pair: pair[0])
        yield round_number, (first, received, change)
        change = federation.server.parameters.detach() - received


def main() -> None:
    parser = argparse.ArgumentParser(description="Train for the updates that codec.py codes.")
    parser.add_argument("--root", default="../shared/data", help="where CIFAR-10 is")
    parser.add_argument("names", nargs="*", default=list(RECIPES), metavar="NAME")
    args = parser.parse_args()
    for name in args.names:
        print(name)
        load_updates(name, args.root)


if __name__ == "__main__":
    main()
