"""The simulated clock: what a round would take over real links and devices.

A star: every client talks to the server over its own link, all at once, so a round lasts as long
as its slowest client: max_i(down_i + compute_i + up_i).
"""

from collections.abc import Iterable
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


def round_seconds(client_seconds: Iterable[float]) -> float:
    """The length of a synchronous round; 0 without clients."""
    return max(client_seconds, default=0.0)
