"""The simulated clock: what a round would take over real links and devices.

A star: every client talks to the server over its own link, all at once, so a round lasts as long
as its slowest client: max_i(down_i + compute_i + up_i).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """One client's connection; mbps are 10^6 bits per second."""

    uplink_mbps: float
    downlink_mbps: float
    latency_ms: float

    def seconds(self, num_bytes: int, direction: str) -> float:
        """How long a message of num_bytes travels `up` or `down`."""
        mbps = {"up": self.uplink_mbps, "down": self.downlink_mbps}[direction]
        return self.latency_ms / 1e3 + 8 * num_bytes / (mbps * 1e6)


@dataclass(frozen=True)
class Device:
    """One client's computer, by its training time for one example."""

    ms_per_example: float

    def seconds(self, num_examples: int) -> float:
        return num_examples * self.ms_per_example / 1e3


def client_timeline(
    messages: Sequence[tuple[str, int]], link: Link, computing: float
) -> tuple[list[tuple[float, float]], float]:
    """When each message of a client starts and how long it takes, and when the client is done.

    messages: (direction, num_bytes), those down before those up; between them the client computes
    for `computing` seconds. All times are in seconds from the start of the round.
    """
    downs = [link.seconds(size, way) for way, size in messages if way == "down"]
    ups = [link.seconds(size, way) for way, size in messages if way == "up"]
    times = [*_one_after_the_other(0.0, downs)]
    times += _one_after_the_other(sum(downs) + computing, ups)
    return times, sum(downs) + sum(ups) + computing


def _one_after_the_other(start: float, lengths: list[float]) -> Iterator[tuple[float, float]]:
    for length in lengths:
        yield start, length
        start += length
