"""Read a run folder into a Run, and check that its files agree with each other.

Bytes are counted from the ledger, which has a row for each message. The files rounds.jsonl and
summary.json repeat its sums; a run in which they differ is refused, not reported.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bandwidth_analysis.errors import REPAIR, AnalysisError, printable
from bandwidth_analysis.population import Population, read_population
from bandwidth_analysis.run_files import (
    MEANS,
    NUMBER,
    NUMBER_OR_NULL,
    get,
    read_ledger,
    read_mapping,
    read_rounds,
)
from bandwidth_analysis.samples import Samples, read_samples
from bandwidth_analysis.timeline import Timeline, read_timeline

LINKS = ("uplink", "downlink")
BYTES_PER_VALUE = 4  # of a message in float32
MEAN_OVER = 5  # evaluations to average for a run without a summary; evaluation.last in the config
DATASET_NAMES = {"cifar10": "CIFAR-10", "digits": "scikit-learn's digits"}


@dataclass(frozen=True, eq=False)
class Run:
    """What a run folder holds. R rounds are complete; arrays over rounds begin with round 1."""

    folder: Path
    name: str
    seed: int
    model: str
    dataset: str
    fallback: str  # why this data set replaced the configured one; empty if it did not
    finished: bool
    rounds_planned: int
    accuracy: np.ndarray  # float64 [R], from 0 to 1; NaN if the round was not evaluated
    traffic: dict[str, np.ndarray]  # bytes_up, bytes_down, dense_bytes_up, ..._down: int64 [R]
    last_accuracy: float  # from 0 to 1; NaN if no round was evaluated
    mean_accuracy: float  # from 0 to 1, the mean of the last `mean_over` evaluations
    mean_over: int
    simulated_seconds: float
    wall_seconds: float
    waited_seconds: float  # the mean over the rounds, as of the next two; NaN if it is not known
    link_utilisation: float  # from 0 to 1
    device_utilisation: float
    labels_per_client: np.ndarray  # int64 [num_clients, num_classes]
    class_names: list[str]  # num_classes names
    samples: Samples | None  # of the clients' pictures, from a run with data.diversity
    population: Population | None  # of links and devices, from a run whose clients are not alike
    traced: list[str]  # columns of the population that the traces of the config stand in for
    timeline: Timeline | None  # of the last round or the one asked for; None before round 1
    num_values_up: np.ndarray  # int64 [R], in all clients' messages of a round
    bytes_by_kind: dict[tuple[str, str], int]  # of all messages of a direction and a kind
    rows: list[dict]  # R rows of rounds.jsonl
    config: dict  # what config.yaml says
    environment: dict  # what environment.json says

    @property
    def num_rounds(self) -> int:
        """The number of complete rounds, R."""
        return len(self.accuracy)

    def total(self, kind: str) -> int:
        """Return the bytes of all rounds; kind is a key of `traffic`, such as "dense_bytes_up"."""
        return int(self.traffic[kind].sum())

    @property
    def density_up(self) -> np.ndarray:
        """Which share of the values of a dense update travelled up: float64 [R], from 0 to 1."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.num_values_up / (self.traffic["dense_bytes_up"] / BYTES_PER_VALUE)

    @property
    def bits_per_value_up(self) -> np.ndarray:
        """The bits of all payloads, positions and headers included, for each value: float64 [R]."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return 8 * self.traffic["bytes_up"] / self.num_values_up

    def per_round(self, key: str) -> np.ndarray:
        """Return what the rows hold under the key, float64 [R]; NaN in a round without it."""
        values = [row.get(key) for row in self.rows]
        return np.array([_or_nan(value) for value in values], dtype=np.float64)


def read_run(folder: Path, timeline_round: int | None = None) -> Run:
    """Read one run folder, whether the run is finished or not.

    A run that still goes on, or was killed, is read up to its last complete round. timeline_round:
    the round of the timeline, from 1; the last one if it is None. Raises AnalysisError if the
    folder is missing or is not a run folder, if it has no such round, if one of its files is
    missing or damaged, and if ledger.csv, rounds.jsonl and summary.json disagree.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AnalysisError(f"{folder}: no such folder; give a run folder, outputFolder/<name>-s0")
    if not (folder / "config.yaml").is_file():
        raise AnalysisError(f"{folder}: not a run folder (no config.yaml); give outputFolder/<run>")
    finished = (folder / "summary.json").exists()
    # The ledger is read after the rows. If the run goes on meanwhile, the ledger may hold messages
    # of later rounds than the rows, and these are left out.
    rows = read_rounds(folder / "rounds.jsonl", may_be_missing=not finished)
    ledger = read_ledger(folder / "ledger.csv", may_be_missing=not rows)
    rows = _rows_in_ledger(rows, ledger, finished, folder)
    labels_per_client, class_names = _read_partition(folder / "partition.npz")
    return Run(
        folder=folder,
        **_read_identity(folder / "config.yaml", folder / "environment.json"),
        finished=finished,
        accuracy=_accuracies(rows),
        traffic=_bytes_per_round(ledger, len(rows)),
        **_read_outcome(folder / "summary.json", rows, ledger, finished),
        **{key: _mean(rows, key) for key in MEANS},
        labels_per_client=labels_per_client,
        class_names=class_names,
        samples=read_samples(folder / "samples.npz", *labels_per_client.shape),
        population=read_population(folder / "population.csv", len(labels_per_client)),
        timeline=_read_timeline(folder, rows, timeline_round),
        num_values_up=_sum_per_round(ledger, len(rows), "up", "num_values"),
        bytes_by_kind=_bytes_by_kind(ledger, len(rows)),
        rows=rows,
    )


def run_labels(runs: list[Run]) -> list[str]:
    """Return a short name for each run: name-s<seed>, or the folder if runs share that name."""
    names = [f"{run.name}-s{run.seed}" for run in runs]
    folders = [run.folder.resolve() for run in runs]
    parents: dict[str, list[Path]] = {}
    for name, folder in zip(names, folders, strict=True):
        parents.setdefault(name, []).append(folder.parent)
    return [
        name
        if len(parents[name]) == 1
        else printable(str(folder.relative_to(os.path.commonpath(parents[name]))))
        for name, folder in zip(names, folders, strict=True)
    ]


def fallback_notes(runs: list[Run]) -> list[str]:
    """Return a sentence for each reason why runs used another data set than the configured one."""
    runs_by_note: dict[str, list[str]] = {}
    for run, label in zip(runs, run_labels(runs), strict=True):
        if run.fallback:
            used = DATASET_NAMES.get(run.dataset, run.dataset)
            note = f"{run.fallback.rstrip(' .:;')}; these are {used}"
            runs_by_note.setdefault(note, []).append(label)
    if len(runs_by_note) == 1 and all(run.fallback for run in runs):
        return list(runs_by_note)
    return [f"{', '.join(labels)}: {note}" for note, labels in runs_by_note.items()]


def _read_identity(config_path: Path, environment_path: Path) -> dict[str, Any]:
    """Read the fields of Run that config.yaml and environment.json hold."""
    config = read_mapping(config_path, yaml.safe_load)
    environment = read_mapping(environment_path, json.loads)
    dataset = get(environment, "dataset", dict, environment_path)
    model = get(config, "model", dict, config_path)
    network = get({"network": {}} | config, "network", dict, config_path)
    return {
        "name": printable(str(get(config, "name", (str, int), config_path))),
        "seed": get(config, "seed", int, config_path),
        "rounds_planned": get(config, "rounds", int, config_path),
        "model": printable(get(model, "name", str, config_path)),
        "traced": [f"{way}_mbps" for way in LINKS if network.get(f"{way}_trace")],
        "dataset": printable(get(dataset, "name", str, environment_path)),
        "fallback": printable(" ".join(str(dataset.get("fallback") or "").split())),
        "config": config,
        "environment": environment,
    }


def _bytes_per_round(ledger: np.ndarray, num_rounds: int) -> dict[str, np.ndarray]:
    """Sum up bytes_up, bytes_down, dense_bytes_up and dense_bytes_down: int64 [num_rounds] each."""
    return {
        f"{column}_{direction}": _sum_per_round(ledger, num_rounds, direction, column)
        for direction in ("up", "down")
        for column in ("bytes", "dense_bytes")
    }


def _sum_per_round(ledger: np.ndarray, num_rounds: int, direction: str, column: str) -> np.ndarray:
    messages = ledger[(ledger["direction"] == direction) & (ledger["round"] <= num_rounds)]
    # bincount adds in float64, which is exact below 2^53 bytes (9 petabytes) in a round.
    sums = np.bincount(messages["round"] - 1, messages[column], minlength=num_rounds)
    return sums.astype(np.int64)


def _bytes_by_kind(ledger: np.ndarray, num_rounds: int) -> dict[tuple[str, str], int]:
    messages = ledger[ledger["round"] <= num_rounds]
    kinds = sorted({(str(row["direction"]), str(row["kind"])) for row in messages})
    return {
        (direction, kind): int(
            messages["bytes"][
                (messages["direction"] == direction) & (messages["kind"] == kind)
            ].sum()
        )
        for direction, kind in kinds
    }


def _rows_in_ledger(
    rows: list[dict], ledger: np.ndarray, finished: bool, folder: Path
) -> list[dict]:
    """Return the rows whose bytes the ledger confirms.

    A kill may leave the last round of an unfinished run half-written in the ledger; then that round
    does not count. Any other difference is damage, and raises AnalysisError.
    """
    traffic = _bytes_per_round(ledger, len(rows))
    for index, row in enumerate(rows):
        for key in ("bytes_up", "bytes_down"):
            if row[key] == traffic[key][index]:
                continue
            if not finished and index == len(rows) - 1:
                return rows[:index]
            raise AnalysisError(
                f"{folder}: {key} of round {index + 1} is {row[key]} in rounds.jsonl but "
                f"{traffic[key][index]} in ledger.csv; {REPAIR}"
            )
    return rows


def _read_outcome(
    path: Path, rows: list[dict], ledger: np.ndarray, finished: bool
) -> dict[str, Any]:
    """Read the fields of Run that summary.json holds, or compute them from the rows so far.

    Raises AnalysisError if the summary's rounds and bytes differ from the rows and the ledger.
    """
    summary = read_mapping(path, json.loads) if finished else _summary_so_far(rows)
    if finished:
        _check_summary(path, summary, rows, ledger)
    return {
        "last_accuracy": _or_nan(get(summary, "test_accuracy", NUMBER_OR_NULL, path)),
        "mean_accuracy": _or_nan(get(summary, "test_accuracy_mean", NUMBER_OR_NULL, path)),
        "mean_over": get(summary, "test_accuracy_mean_over", int, path),
        "simulated_seconds": get(summary, "simulated_seconds", NUMBER, path),
        "wall_seconds": get(summary, "wall_seconds", NUMBER, path),
    }


def _check_summary(path: Path, summary: dict, rows: list[dict], ledger: np.ndarray) -> None:
    """Raise AnalysisError if the summary's rounds and bytes differ from the rows and the ledger."""
    rounds = get(summary, "rounds_completed", int, path)
    last_round = ledger["round"].max(initial=0)
    if rounds != len(rows) or last_round > rounds:
        raise AnalysisError(
            f"{path.parent}: summary.json counts {rounds} rounds, rounds.jsonl {len(rows)}, "
            f"ledger.csv {last_round}; {REPAIR}"
        )
    for key, per_round in _bytes_per_round(ledger, rounds).items():
        if get(summary, key, int, path) != per_round.sum():
            raise AnalysisError(
                f"{path.parent}: {key} is {summary[key]} in summary.json but {per_round.sum()} in "
                f"ledger.csv; {REPAIR}"
            )


def _summary_so_far(rows: list[dict]) -> dict[str, Any]:
    """Return what summary.json would say, under the same keys, if the run ended now."""
    accuracy = _accuracies(rows)
    evaluations = accuracy[~np.isnan(accuracy)][-MEAN_OVER:]
    return {
        "test_accuracy": float(evaluations[-1]) if len(evaluations) else None,
        "test_accuracy_mean": float(evaluations.mean()) if len(evaluations) else None,
        "test_accuracy_mean_over": len(evaluations),
        "simulated_seconds": sum(row["simulated_seconds"] for row in rows),
        "wall_seconds": sum(row["wall_seconds"] for row in rows),
    }


def _accuracies(rows: list[dict]) -> np.ndarray:
    """Return the test accuracy of each round, float64 [R]; NaN if the round was not evaluated."""
    return np.array([_or_nan(row["test_accuracy"]) for row in rows], dtype=np.float64)


def _mean(rows: list[dict], key: str) -> float:
    """Return the mean over the rounds that have the value, or NaN if none has."""
    values = [row[key] for row in rows if row[key] is not None]
    return sum(values) / len(values) if values else float("nan")


def _read_timeline(folder: Path, rows: list[dict], round_number: int | None) -> Timeline | None:
    """Read the timeline of a round; None stands for the last one."""
    if round_number is None:
        if not rows:
            return None
        round_number = len(rows)
    if not 1 <= round_number <= len(rows):
        raise AnalysisError(
            f"{folder}: there is no round {round_number}; it has {len(rows)} complete rounds"
        )
    *before, row = rows[:round_number]
    return read_timeline(
        folder / "ledger.csv",
        round_number,
        begin=sum(row["simulated_seconds"] for row in before),
        seconds=row["simulated_seconds"],
        left_out={*map(str, row["late"]), *row["failures"]},
    )


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _read_partition(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read labels_per_client, int64 [num_clients, num_classes], and the names of the classes."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            labels_per_client, class_names = arrays["labels_per_client"], arrays["class_names"]
    except OSError as error:
        raise AnalysisError(f"{path}: cannot be read ({error}); {REPAIR}") from None
    except Exception:  # numpy and zipfile raise a dozen kinds for damaged files
        raise AnalysisError(f"{path}: damaged or half-written; {REPAIR}") from None
    is_table = labels_per_client.ndim == 2 and np.issubdtype(labels_per_client.dtype, np.integer)
    if not is_table or labels_per_client.shape[1:] != class_names.shape:
        raise AnalysisError(
            f"{path}: labels_per_client is {labels_per_client.dtype} of shape "
            f"{labels_per_client.shape} for {class_names.size} class names; {REPAIR}"
        )
    return labels_per_client, [printable(str(name)) for name in class_names]
