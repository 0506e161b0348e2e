"""Read population.csv: the links and devices of a run whose clients are not all alike."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bandwidth_analysis.errors import REPAIR, AnalysisError, printable

NUMBERS = ("uplink_mbps", "downlink_mbps", "latency_ms", "ms_per_example")


@dataclass(frozen=True, eq=False)
class Population:
    """A value for each client in every array."""

    uplink_mbps: np.ndarray  # float64, as all numbers; 10^6 bits per second
    downlink_mbps: np.ndarray
    latency_ms: np.ndarray  # one way
    ms_per_example: np.ndarray  # of training
    link: np.ndarray  # the profile's name, as text
    device: np.ndarray


def read_population(path: Path, num_clients: int) -> Population | None:
    """Read population.csv; return None if there is none. Raises AnalysisError if it is damaged."""
    if not path.exists():
        return None
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = {name: np.array([float(row[name]) for row in rows]) for name in NUMBERS}
        names = {key: np.array([printable(row[key]) for row in rows]) for key in ("link", "device")}
    except OSError as error:
        raise AnalysisError(f"{path}: cannot be read ({error.strerror}); {REPAIR}") from None
    except (ValueError, TypeError, KeyError, csv.Error):
        raise AnalysisError(f"{path}: damaged or half-written; {REPAIR}") from None
    if len(rows) != num_clients:
        raise AnalysisError(f"{path}: has {len(rows)} clients, not {num_clients}; {REPAIR}")
    for name, column in columns.items():
        if not (np.isfinite(column) & (column >= 0)).all():
            raise AnalysisError(f"{path}: damaged, {name} is negative or no number; {REPAIR}")
    return Population(**columns, **names)
