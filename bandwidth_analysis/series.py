"""The accuracy of a group's runs over rounds, megabytes or time, as arrays."""

from collections.abc import Callable

import numpy as np

from bandwidth_analysis.groups import Group
from bandwidth_analysis.runs import Run

# What a curve runs over, as arrays [R] of a run: what has been sent or has passed by a round's end.
Over = Callable[[Run], np.ndarray]


def rounds(run: Run) -> np.ndarray:
    return np.arange(1, run.num_rounds + 1)


def megabytes_up(run: Run) -> np.ndarray:
    return np.cumsum(run.traffic["bytes_up"]) / 1e6


def megabytes_down(run: Run) -> np.ndarray:
    return np.cumsum(run.traffic["bytes_down"]) / 1e6


def megabytes(run: Run) -> np.ndarray:
    return megabytes_up(run) + megabytes_down(run)


def simulated_minutes(run: Run) -> np.ndarray:
    return np.cumsum(run.per_round("simulated_seconds")) / 60


def wall_minutes(run: Run) -> np.ndarray:
    return np.cumsum(run.per_round("wall_seconds")) / 60


def curve(group: Group, over: Over) -> tuple[np.ndarray, np.ndarray]:
    """Return x, float [E], and the accuracy (%) of each run, float [num_runs, E].

    E counts the rounds in which every run of the group was evaluated; x is a mean over the runs.
    """
    length = min(run.num_rounds for run in group.runs)
    accuracy = np.array([run.accuracy[:length] for run in group.runs])
    evaluated = np.flatnonzero(~np.isnan(accuracy).any(axis=0))
    x = np.mean([over(run)[evaluated] for run in group.runs], axis=0)
    return x, 100 * accuracy[:, evaluated]


def spread_of(values: np.ndarray) -> float:
    """The largest value divided by the least one above 0; 1 if there is none."""
    positive = values[values > 0]
    return float(positive.max() / positive.min()) if positive.size else 1.0
