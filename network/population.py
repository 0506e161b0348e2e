"""The clients of a run: for each its link and its device, as columns of numbers.

The figures are those of the config, drawn from profiles, or read from a CSV file. A draw is a
function of (seed, client), so client 7 stays who it is when there are more clients.
"""

import csv
import hashlib
import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from network.draws import normal, uniform
from network.profiles import DEVICES, LINKS
from network.table import read_table
from network.trace import Trace, read_trace

FARTHEST = 2.5  # chosen: draws stay within so many standard deviations, where links were measured
NO_NAME = "constant"
# Columns of a CSV file that may be missing, with what a client then has.
OPTIONAL = {"jitter_ms": 0.0, "loss": 0.0, "memory_gib": math.inf}
NAMES = ("link", "device")


@dataclass(frozen=True, eq=False)
class Population:
    """A row for each client; mbps are 10^6 bits per second on the wire, latency is one way."""

    uplink_mbps: np.ndarray  # float64 (clients), as all columns of numbers
    downlink_mbps: np.ndarray
    latency_ms: np.ndarray  # once per message
    jitter_ms: np.ndarray  # standard deviation of a message's latency
    loss: np.ndarray  # share of packets
    ms_per_example: np.ndarray  # of training
    memory_gib: np.ndarray  # inf: enough for anything
    link: np.ndarray  # the profile's name, as text
    device: np.ndarray
    uplink_trace: Trace | None = None  # stands in for every client's uplink_mbps
    downlink_trace: Trace | None = None
    seed: int = 0  # decides at which moment of a trace each client starts

    def __len__(self) -> int:
        return len(self.uplink_mbps)

    def followed_by(self, others: "Population") -> "Population":
        """These and then the others, whose links have no traces."""
        columns = zip(self.columns().items(), others.columns().values(), strict=True)
        return replace(self, **{name: np.concatenate([a, b]) for (name, a), b in columns})

    def columns(self) -> dict[str, np.ndarray]:
        """The table of the population, by the names that a CSV file of clients has, too."""
        return {name: getattr(self, name) for name in _columns()}

    @property
    def is_diverse(self) -> bool:
        """Whether any two clients differ."""
        return any((column != column[0]).any() for column in self.columns().values())


def _columns() -> list[str]:
    return [name for name, kind in Population.__annotations__.items() if kind is np.ndarray]


def make_population(
    settings: Any, num_clients: int, seed: int, locate: Callable[[str], Path] = Path
) -> Population:
    """The clients that config.py's section `network` describes.

    locate: turns a path of the section into one that can be opened.
    Raises ValueError: the file and its line, and what is wrong there; OSError.
    """
    paths = {"up": settings.uplink_trace, "down": settings.downlink_trace}
    traces = {f"{way}link_trace": read_trace(locate(p)) for way, p in paths.items() if p}
    if settings.clients_file:
        columns = read_clients(locate(settings.clients_file), num_clients)
    else:
        clients = np.arange(num_clients)
        columns = _draw_links(settings, clients, seed) | _draw_devices(settings, clients, seed)
    return Population(**columns, **traces, seed=seed)


# --- drawn ----------------------------------------------------------------------------------------


def _draw_links(settings: Any, clients: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    names = choose_by_share(settings.links, list(LINKS), clients, seed, "link")
    quality, delay = (_draw(seed, what, clients) for what in ("bandwidth", "latency"))

    def figure(key: str) -> np.ndarray:
        return _by_name(names, LINKS, key, getattr(settings, key, 0.0))

    spread = _by_name(names, LINKS, "spread", settings.spread)
    delayed = np.exp(figure("latency_spread") * delay)
    return {
        "uplink_mbps": figure("uplink_mbps") * np.exp(spread * quality),
        "downlink_mbps": figure("downlink_mbps") * np.exp(spread * quality),
        "latency_ms": figure("latency_ms") * delayed,
        "jitter_ms": figure("jitter_ms") * delayed,
        "loss": figure("loss"),
        "link": names,
    }


def _draw_devices(settings: Any, clients: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    names = choose_by_share(settings.devices, list(DEVICES), clients, seed, "device")
    spread = _by_name(names, DEVICES, "spread", settings.spread)
    speed = _by_name(names, DEVICES, "speed", 1.0)
    speed = speed * np.exp(spread * _draw(seed, "speed", clients))
    enough = math.inf if settings.memory_gib is None else settings.memory_gib
    memory = _by_name(names, DEVICES, "memory_gib", enough)
    spread = _by_name(names, DEVICES, "memory_spread", 0.0)
    return {
        "ms_per_example": settings.ms_per_example / speed,
        "memory_gib": memory * np.exp(spread * _draw(seed, "memory", clients)),
        "device": names,
    }


def choose_by_share(
    shares: dict[str, float], order: list[str], clients: np.ndarray, seed: int, purpose: str
) -> np.ndarray:
    """Each client's profile: text (clients). In whatever order the shares are given."""
    names = [name for name in order if name in shares] or [NO_NAME]
    sums = np.cumsum([shares.get(name, 1.0) for name in names])
    places = np.searchsorted(sums, uniform(seed, purpose, clients) * sums[-1], side="right")
    return np.array(names)[places]


def _by_name(names: np.ndarray, table: dict, key: str, otherwise: float) -> np.ndarray:
    """The profiles' figures; `otherwise` for clients without a profile."""
    figures = np.full(len(names), otherwise, dtype=np.float64)
    for name in np.unique(names):
        if name in table:
            figures[names == name] = getattr(table[name], key)
    return figures


def _draw(seed: int, purpose: str, clients: np.ndarray) -> np.ndarray:
    return np.clip(normal(seed, purpose, clients), -FARTHEST, FARTHEST)


# --- written --------------------------------------------------------------------------------------


def write_clients(path: Path, population: Population) -> str:
    """Write the columns to a CSV file, whole or not at all; return its SHA-256 in hex.

    A row for each client, in order. read_clients() reads the very same figures from it.
    """
    columns, text = population.columns(), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
    content = text.getvalue().encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return hashlib.sha256(content).hexdigest()


# --- read -----------------------------------------------------------------------------------------


def read_clients(path: Path, num_clients: int) -> dict[str, np.ndarray]:
    """The columns of a CSV file: a heading of names, then a row for each client.

    Columns jitter_ms, loss, memory_gib, link and device may be missing.
    Raises ValueError: file and line, and what is wrong there; OSError.
    """
    numbers = [name for name in _columns() if name not in NAMES]
    required = [name for name in numbers if name not in OPTIONAL]
    rows = []
    for place, row in read_table(path, required, [*OPTIONAL, *NAMES]):
        rows.append([_number(row, name, place) for name in numbers])
        rows[-1] += [row.get(name, NO_NAME) for name in NAMES]
    if len(rows) != num_clients:
        raise ValueError(f"{path}:1: {len(rows)} clients do not fit clients.total={num_clients}")
    values = list(zip(*rows, strict=True))
    kinds = [np.float64] * len(numbers) + [np.str_] * len(NAMES)
    named = zip([*numbers, *NAMES], values, kinds, strict=True)
    return {name: np.array(column, kind) for name, column, kind in named}


def _number(row: dict[str, str], name: str, place: str) -> float:
    text = row.get(name, OPTIONAL.get(name))
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    above_zero = name.endswith("mbps") or name == "memory_gib"
    if name == "loss":
        is_fit, expected = 0 <= number < 1, "at least 0 and below 1"
    elif above_zero:
        is_fit, expected = number > 0, "above 0"
    else:
        is_fit, expected = number >= 0, "at least 0"
    if not is_fit or (math.isinf(number) and name != "memory_gib"):
        raise ValueError(f"{place}: {name}: {text!r} is not a number {expected}")
    return number
