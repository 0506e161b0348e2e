"""Who is there when, and who drops out in the middle of a round.

An availability answers two questions about any number of clients at once: when does each next come,
and when does it then leave. Times are seconds of simulated time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from network.draws import uniform
from network.table import read_table

LATEST = 10**12  # milliseconds of a trace; (client, time) is then one number of 63 bits
SOON = 1e-9  # a client that comes within this part of its period is there: times are rounded


class Availability:
    """Every client is there all the time; the classes below say otherwise."""

    def comes(self, clients: np.ndarray, seconds: float) -> np.ndarray:
        """When each client is there, from then on: `seconds` if it is; inf: never."""
        return np.full(len(clients), float(seconds))

    def leaves(self, clients: np.ndarray, seconds: float) -> np.ndarray:
        """When each client that is there then leaves; `seconds` for one that is not there."""
        return np.full(len(clients), math.inf)

    def is_there(self, clients: np.ndarray, seconds: float) -> np.ndarray:
        """Whether each client is there at that time: bool (clients)."""
        return self.comes(clients, seconds) == seconds


@dataclass(frozen=True)
class Diurnal(Availability):
    """Each client is there for the same share of every period, from a moment of its own on."""

    period: float  # seconds
    share: float  # above 0, at most 1
    phases: np.ndarray  # float64 (clients), 0 to 1: where in its period each is at time 0

    def comes(self, clients: np.ndarray, seconds: float) -> np.ndarray:
        since = self._since_coming(clients, seconds)
        waits = np.where(since < self.share * self.period, 0.0, self.period - since)
        return seconds + waits

    def leaves(self, clients: np.ndarray, seconds: float) -> np.ndarray:
        if self.share == 1:
            return np.full(len(clients), math.inf)
        stays = self.share * self.period - self._since_coming(clients, seconds)
        return seconds + np.maximum(0.0, stays)

    def _since_coming(self, clients: np.ndarray, seconds: float) -> np.ndarray:
        """Seconds since each client last came."""
        since = (seconds + self.phases[clients] * self.period) % self.period
        return np.where(self.period - since < SOON * self.period, 0.0, since)


class Traced(Availability):
    """Each client is there in the intervals of a file, and never after its last one."""

    def __init__(self, intervals: list[tuple[int, int, int]]):
        """intervals: (client, from, to) in milliseconds; those of a client do not overlap."""
        table = np.array(sorted(intervals), np.int64).reshape(-1, 3)
        self.owners, self.starts, self.ends = table.T
        # One number for (client, time): its order is that of the table.
        self.longest = int(self.ends.max(initial=0)) + 1
        self.keys = self.owners * self.longest + self.ends

    def comes(self, clients: np.ndarray, seconds: float) -> np.ndarray:
        place, is_own = self._interval(clients, seconds)
        return np.where(is_own, np.maximum(seconds, self.starts[place] / 1e3), math.inf)

    def leaves(self, clients: np.ndarray, seconds: float) -> np.ndarray:
        place, is_own = self._interval(clients, seconds)
        is_there = is_own & (self.starts[place] / 1e3 <= seconds)
        return np.where(is_there, self.ends[place] / 1e3, seconds)

    def _interval(self, clients: np.ndarray, seconds: float) -> tuple[np.ndarray, np.ndarray]:
        """The place of each client's first interval that ends later, and whether there is one."""
        clients = np.asarray(clients)
        now = min(math.floor(1e3 * seconds + 1e-6), self.longest - 1)
        place = np.searchsorted(self.keys, clients * self.longest + now, side="right")
        place = np.minimum(place, len(self.keys) - 1)
        return place, (self.owners[place] == clients) & (self.ends[place] > now)


def make_availability(
    settings: Any, num_clients: int, seed: int, locate: Callable[[str], Path] = Path
) -> Availability:
    """The availability that config.py's section `network.availability` describes.

    locate: turns a path of the section into one that can be opened.
    Raises ValueError: the file and its line, and what is wrong there; OSError.
    """
    if settings.name == "trace":
        return Traced(read_intervals(locate(settings.file), num_clients))
    if settings.name == "diurnal":
        phases = uniform(seed, "availability", np.arange(num_clients))
        return Diurnal(3600 * settings.period_hours, settings.share, phases)
    return Availability()


def read_intervals(path: Path, num_clients: int) -> list[tuple[int, int, int]]:
    """(client, from, to) in milliseconds from a CSV file with these columns, in seconds.

    Raises ValueError: file and line, and what is wrong there; OSError.
    """
    intervals, ends = [], {}
    for place, row in read_table(path, ["client", "from", "to"]):
        try:
            client = int(row["client"])
            start, end = (round(1e3 * float(row[key])) for key in ("from", "to"))
        except (ValueError, OverflowError):
            raise ValueError(f"{place}: {','.join(row.values())!r} is not three numbers") from None
        if not 0 <= client < num_clients:
            raise ValueError(f"{place}: no client {client}: clients.total={num_clients}")
        if not ends.get(client, 0) <= start < end <= LATEST:
            raise ValueError(f"{place}: client {client}: its times must go forward, to 10^9 s")
        ends[client] = end
        intervals.append((client, start, end))
    if not intervals:
        raise ValueError(f"{path}:1: no client is ever there: add lines of client,from,to")
    return intervals


def dropouts(probability: float, seed: int, round_number: int, clients: np.ndarray) -> np.ndarray:
    """After which share of its work each client drops out of a round: inf if it does not.

    Each drops out with the probability, independently, at a moment uniform over its work, which
    lasts for Simulation.seconds_alone().
    """
    clients = np.asarray(clients)
    if not probability:
        return np.full(clients.shape, math.inf)
    drops = uniform(seed, "dropout", round_number, clients, 0) < probability
    return np.where(drops, uniform(seed, "dropout", round_number, clients, 1), math.inf)
