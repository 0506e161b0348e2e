"""Densities by capability: each client sends what its link can carry until the deadline."""

import math
from collections.abc import Callable
from dataclasses import replace

from compression import OVERHEAD, parse_coder
from config import Config
from federation.ledger import BYTES_PER_VALUE

MARGIN = 0.9  # of the time that is left: jitter, other flows and heads of payloads take some
LEAST = 1e-4  # of the coordinates; a client that cannot even send these is late
PROBE = 1_000_000  # bytes, by which the speed of an upload is told


def fit_to_deadline(
    config: Config,
    seconds: Callable[[int, int], float],
    size_of: Callable[[int], int],
    num_buffers: int,
) -> Config:
    """The config with a density for each client, such that its update arrives in time.

    seconds: of a client's whole round with so many bytes up, if it is alone; size_of: coordinates
    of a client's network; num_buffers: float32 values that travel besides. Both ends build it from
    the same config.
    """
    if not config.pruning.fit_deadline:
        return config
    deadline, pruning = config.schedule.deadline_seconds, config.pruning
    densities = []
    for client in range(config.clients.total):
        nothing = seconds(client, 1)
        rate = PROBE / (seconds(client, 1 + PROBE) - nothing)  # bytes a second
        room = MARGIN * max(0.0, deadline - nothing) * rate
        room -= 2 * OVERHEAD + BYTES_PER_VALUE * num_buffers
        densities.append(_fitting(room, size_of(client), config, pruning.density))
    return replace(config, pruning=replace(pruning, client_densities=densities))


def _fitting(num_bytes: float, size: int, config: Config, largest: float) -> float:
    """The largest density, LEAST to `largest`, whose payload has at most so many bytes."""
    with_positions = config.pruning.method == "topk"
    bits = parse_coder(config.uplink.values).bits_per_value
    low, high = LEAST, largest
    if size * bits_at(high, bits, with_positions) <= 8 * num_bytes:
        return high
    for _ in range(40):  # the bits grow with the density wherever values cost more than half a bit
        middle = (low + high) / 2
        fits = size * bits_at(middle, bits, with_positions) <= 8 * num_bytes
        low, high = (middle, high) if fits else (low, middle)
    return low


def bits_at(density: float, bits_per_value: float, with_positions: bool) -> float:
    """Bits for each coordinate of a vector of which this share travels, about.

    Positions cost the entropy of a coin, which wire/ comes within a few percent of; positions that
    both ends draw from a seed cost nothing.
    """
    if not with_positions or density >= 1:
        return density * bits_per_value
    p, q = density, 1 - density
    return p * bits_per_value - p * math.log2(p) - q * math.log2(q)
