"""Densities that fit: each client's to a deadline, by its link, or everybody's to a budget."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from algorithms import make_algorithm
from compression import OVERHEAD, parse_coder
from config import Config, ConfigError
from federation.budget import WHOLE_BITS, ratio_of, with_budget
from federation.ledger import BYTES_PER_VALUE

MARGIN = 0.9  # of the time that is left: jitter, other flows and heads of payloads take some
LEAST = 1e-4  # of the coordinates; a client that cannot even send these is late
# The values of a random choice are scaled by 1 / density, so an update of fewer is mostly noise:
# one client that sent 0.01% made a LeNet infinite.
LEAST_AT_RANDOM = 0.05
LEAST_BITS = 0.001  # of a value: with fewer an update is all noise
HEADS = 1.03  # bits of EDEN for one of its word: scales of blocks, positions above their entropy
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
    scales = config.pruning.method == "random" and not config.uplink.error_feedback
    least = min(LEAST_AT_RANDOM if scales else LEAST, config.pruning.density)
    densities = _fitting(config, room, sizes, num_buffers, least).tolist()
    return replace(config, pruning=replace(config.pruning, client_densities=densities))


def fit_to_budget(
    config: Config, num_values: int, num_buffers: int, num_examples: np.ndarray
) -> Config:
    """The config with the bits and densities of least error that uplink.budget pays for.

    num_values: coordinates of the network; num_buffers: float32 values that travel besides;
    num_examples: of each client, int64. The average that the server makes is off by the sum of
    (weight * norm of the update)^2 * variance over the clients, and variances are about 1 / bits.
    So a client gets bits in proportion to its weight (Neyman 1934), and all together what the
    budget pays for. Norms would add a little: they grow with the third root of the examples. Raises
    ConfigError if the budget hardly pays for the buffers.
    """
    if not config.uplink.budget:
        return config
    algorithm = make_algorithm(config.local.algorithm, **config.local.options)
    vectors, ratio = 1 + bool(algorithm.up), ratio_of(config.uplink.budget)
    room = BYTES_PER_VALUE * (num_values * vectors + num_buffers) / ratio
    left = room - upload_bytes(config, 0.0, np.array(0), num_buffers)  # heads and buffers
    bits = 8 * float(left) / (vectors * num_values)
    by_examples = config.server.weighting == "examples"
    weights = num_examples.astype(float) if by_examples else np.sign(num_examples).astype(float)
    if bits >= 1:
        choices = [
            with_budget(config, whole, _shares(weights, min(1.0, bits / whole)).tolist())
            for whole in WHOLE_BITS
        ]
        return min(choices, key=lambda choice: _error(choice, weights))
    if bits / HEADS < LEAST_BITS:
        raise ConfigError(
            f"uplink.budget: {config.uplink.budget} leaves {room:,.0f} bytes a client, and what "
            f"norm layers send besides takes {BYTES_PER_VALUE * num_buffers:,}; set "
            "model.norm_policy=static, or a smaller number"
        )
    return with_budget(config, bits / HEADS, _shares(weights, bits / HEADS).tolist())


def _shares(weights: np.ndarray, mean: float) -> np.ndarray:
    """Bits or densities in proportion to the weights, none above 1, with this mean.

    A client of weight 0 never sends anything; it has the mean.
    """
    there = weights > 0
    shares = weights / weights.max()
    for _ in range(20):  # what a client that has 1 cannot take, the others get
        shares = np.minimum(1.0, shares * (mean / shares[there].mean()))
    return np.where(there, shares, mean).clip(LEAST_BITS)


def _error(config: Config, weights: np.ndarray) -> float:
    """How far off the average of the updates is, up to a factor that all coders share."""
    variance = parse_coder(config.uplink.values).variance
    return float((weights**2 * (1 + variance) / np.array(config.pruning.client_densities)).sum())


def _fitting(
    config: Config, room: np.ndarray, sizes: np.ndarray | int, num_buffers: int, least: float
) -> np.ndarray:
    """The largest densities up to pruning.density whose uploads have at most `room` bytes."""
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
    bits = bits_per_coordinate(config.uplink.values, config.pruning.method, density)
    vector = OVERHEAD + np.ceil(sizes * bits / 8)
    return vector * (1 + bool(algorithm.up)) + OVERHEAD + BYTES_PER_VALUE * num_buffers


def bits_per_coordinate(
    values: str, method: str, density: np.ndarray | float
) -> np.ndarray | float:
    """About what a coordinate of a vector takes; of a threshold nobody knows, so all of them count.

    values: the coder's word; method: how coordinates are selected, this share of them.
    """
    bits = parse_coder(values).bits_per_value
    if method not in ("topk", "random"):
        return bits
    return bits_at(density, bits, with_positions=method == "topk")


def bits_at(density: np.ndarray | float, bits_per_value: float, with_positions: bool) -> np.ndarray:
    """Bits for each coordinate of a vector of which this share travels, about.

    Positions cost the entropy of a coin, which wire/ comes within a few percent of; positions that
    both ends draw from a seed cost nothing.
    """
    p = np.asarray(density, float)
    values, q = p * bits_per_value, np.maximum(1 - p, 1e-300)  # at 1, q * log2(q) is 0
    return values - p * np.log2(p) - q * np.log2(q) if with_positions else values
