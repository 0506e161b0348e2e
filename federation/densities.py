"""Densities by capability: each client sends what its link can carry until the deadline."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from algorithms import make_algorithm
from compression import OVERHEAD, parse_coder
from config import Config
from federation.ledger import BYTES_PER_VALUE

MARGIN = 0.9  # of the time that is left: jitter, other flows and heads of payloads take some
LEAST = 1e-4  # of the coordinates; a client that cannot even send these is late
# The values of a random choice are scaled by 1 / density, so an update of fewer is mostly noise:
# one client that sent 0.01% made a LeNet infinite.
LEAST_AT_RANDOM = 0.05
PROBE = 1_000_000  # bytes, by which the speed of an upload is told
Seconds = Callable[[np.ndarray, int], np.ndarray]  # of clients that send so many bytes


def fit_to_deadline(
    config: Config, seconds: Seconds, sizes: np.ndarray, num_buffers: int
) -> Config:
    """The config with a density for each client, such that its update arrives in time.

    seconds: of each client's whole round with so many bytes up, if it is alone; sizes: coordinates
    of each client's network; num_buffers: float32 values that travel besides. Both ends have
    the same config, and so the same densities.
    """
    if not config.pruning.fit_deadline:
        return config
    clients = np.arange(config.clients.total)
    nothing = seconds(clients, 1)
    rates = PROBE / (seconds(clients, 1 + PROBE) - nothing)  # bytes a second
    room = MARGIN * np.maximum(0.0, config.schedule.deadline_seconds - nothing) * rates
    densities = _fitting(config, room, sizes, num_buffers).tolist()
    return replace(config, pruning=replace(config.pruning, client_densities=densities))


def _fitting(config: Config, room: np.ndarray, sizes: np.ndarray, num_buffers: int) -> np.ndarray:
    """The largest densities up to pruning.density whose uploads have at most `room` bytes."""
    scales = config.pruning.method == "random" and not config.uplink.error_feedback
    least = min(LEAST_AT_RANDOM if scales else LEAST, config.pruning.density)
    low, high = np.full_like(room, least), np.full_like(room, config.pruning.density)
    middle = high
    for _ in range(41):  # the bits grow with the density wherever values cost more than half a bit
        fits = upload_bytes(config, middle, sizes, num_buffers) <= room
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        middle = (low + high) / 2
    return low


def upload_bytes(
    config: Config, density: np.ndarray | float, sizes: np.ndarray, num_buffers: int
) -> np.ndarray:
    """About how many bytes a client sends at a density: update, control variate, buffers."""
    algorithm = make_algorithm(config.local.algorithm, **config.local.options)
    bits = parse_coder(config.uplink.values).bits_per_value
    if config.pruning.method in ("topk", "random"):
        bits = bits_at(density, bits, with_positions=config.pruning.method == "topk")
    vector = OVERHEAD + np.ceil(sizes * bits / 8)
    return vector * (1 + bool(algorithm.up)) + OVERHEAD + BYTES_PER_VALUE * num_buffers


def bits_at(density: np.ndarray | float, bits_per_value: float, with_positions: bool) -> np.ndarray:
    """Bits for each coordinate of a vector of which this share travels, about.

    Positions cost the entropy of a coin, which wire/ comes within a few percent of; positions that
    both ends draw from a seed cost nothing.
    """
    p = np.asarray(density, float)
    values, q = p * bits_per_value, np.maximum(1 - p, 1e-300)  # at 1, q * log2(q) is 0
    return values - p * np.log2(p) - q * np.log2(q) if with_positions else values
