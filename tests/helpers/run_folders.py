"""Small run folders as a run leaves them, with numbers that can be added up by hand."""

import csv
import json
from pathlib import Path

import numpy as np
import yaml

FALLBACK = "CIFAR-10 was not found in data/cifar10"
NOTE = "CIFAR-10 was not found in data/cifar10; these are scikit-learn's digits"
ACCURACIES = (0.25, None, 0.75)  # of rounds 1, 2, 3
PLOT_NAMES = [
    "accuracy_vs_rounds.png",
    "accuracy_vs_megabytes.png",
    "bytes_per_round.png",
    "density_per_round.png",
    "time_of_a_round.png",
    "labels_per_client.png",
]
PLOT_NAMES_OF_ONE_RUN = [*PLOT_NAMES, "timeline.png"]
PLOT_NAMES_OF_COLUMNS = [  # which every new run has, and write_run() only if it is given them
    "time_by_phase.png",
    "residual_per_round.png",
    "bytes_by_part.png",
    "bytes_by_layer.png",
]
PLOT_NAMES_OF_SEEDS = [
    *PLOT_NAMES,
    "accuracy_by_direction.png",
    "accuracy_vs_time.png",
    "bytes_by_kind.png",
]
PLOT_NAMES_OF_GROUPS = [*PLOT_NAMES_OF_SEEDS, "pareto_front.png"]
LEDGER_COLUMNS = (
    *("round", "direction", "sender", "receiver", "kind"),
    *("bytes", "dense_bytes", "num_values", "start", "seconds"),
)


def message(round_number: int, direction: str, client: int) -> dict:
    """A row of the ledger: a model of 2 MB down, or an update of 10 kB up."""
    is_up = direction == "up"
    ends = (client, "server") if is_up else ("server", client)
    what = ("update", 10_000, 4_000_000, 2000) if is_up else ("model", 2_000_000, 4_000_000, 10**6)
    start = 30.0 * (round_number - 1) + (20.0 + client if is_up else 0.0)
    row = (round_number, direction, *ends, *what, start, 0.25)
    return dict(zip(LEDGER_COLUMNS, row, strict=True))


def write_run(
    parent: Path,
    name: str = "topk",
    seed: int = 0,
    accuracies: tuple = ACCURACIES,
    bytes_up: int = 10_000,  # of each update, next to 4,000,000 dense
    finished: bool = True,
    fallback: str = "",
    num_clients: int = 2,
    class_names: tuple = ("cat", "dog", "ship"),
    has_samples: bool = False,  # a picture of client 0 that calls its cat a dog, two of client 1
    columns: tuple = (),  # of each round: more keys of its row in rounds.jsonl
    links: tuple = (),  # of each client: the profile of its link, as population.csv names it
) -> Path:
    """A run folder in which two clients a round send an update and receive a model of 2 MB."""
    folder = parent / f"{name}-s{seed}"
    folder.mkdir(parents=True)
    config = {"name": name, "seed": seed, "rounds": 3, "model": {"name": "resnet18"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    dataset = {"name": "digits", "fingerprint": "00", "fallback": fallback}
    (folder / "environment.json").write_text(json.dumps({"dataset": dataset}))
    ledger, rows = [], []
    for round_number, accuracy in enumerate(accuracies, start=1):
        for client in (0, 1):
            ledger += [message(round_number, "down", client), message(round_number, "up", client)]
            ledger[-1]["bytes"] = bytes_up
        rows.append({"round": round_number, "test_accuracy": accuracy, "bytes_up": 2 * bytes_up})
        rows[-1] |= {"bytes_down": 4_000_000, "simulated_seconds": 30.0, "wall_seconds": 1.5}
        rows[-1] |= {"waited_seconds": 1.0, "link_utilisation": 0.25, "device_utilisation": None}
    for row, more in zip(rows, columns, strict=False):
        row |= more
    with (folder / "ledger.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, LEDGER_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(ledger)
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.savez(
        folder / "partition.npz",
        labels_per_client=np.arange(3 * num_clients).reshape(num_clients, 3) + seed,
        class_names=np.array(class_names),
    )
    if has_samples:
        np.savez(
            folder / "samples.npz",
            client=[0, 1, 1],
            images=np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3),
            labels=[1, 1, 2],
            classes=[0, 1, 2],
        )
    if links:
        heading = "uplink_mbps,downlink_mbps,latency_ms,ms_per_example,link,device\n"
        clients = [f"{place + 1},8,50,5,{link},phone\n" for place, link in enumerate(links)]
        (folder / "population.csv").write_text(heading + "".join(clients))
    if finished:
        summary = {
            "rounds_completed": len(rows),
            "test_accuracy": 0.75,
            "test_accuracy_mean": 0.5,
            "test_accuracy_mean_over": 2,
            "bytes_up": 2 * bytes_up * len(rows),
            "bytes_down": 4_000_000 * len(rows),
            "dense_bytes_up": 8_000_000 * len(rows),
            "dense_bytes_down": 8_000_000 * len(rows),
            "wall_seconds": 5.0,
            "simulated_seconds": 3723.0,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
