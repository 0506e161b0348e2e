"""Named links and devices: the medians and spreads from which a client's own figures are drawn.

Each figure is measured, and then its source stands beside it, or it is chosen: a round number of
the right order that nobody is cited for. A spread is the standard deviation of a figure's natural
logarithm. A link's uplink and downlink share one draw, because a bad link is bad both ways.

The bandwidths were measured over TCP, on links that lost what they lost: a profile's loss is
therefore 0, or it would count twice.

Sources:
  China 2021   10,000 speed tests per kind of access, mobilebandwidth.github.io (Apache-2.0)
  world 2020   median speed test: mobile 36 down, 11.2 up, 40 ms; fixed 85.7 down, 45.7 up, 21 ms
  world 2021   median 5G speed test of the third quarter: 166 down, 21 up
  Norway 3G    1.3 Mbit/s down, between 0.8 and 2.5 for most tests
  mahimahi     its trace of UMTS: 2.0 down, 0.95 up
  FedScale     5 ms of training per example, with a spread of 0.6 between phones
"""

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LinkProfile:
    """Medians of a kind of access; mbps are 10^6 bits per second."""

    downlink_mbps: float
    uplink_mbps: float
    spread: float  # of both bandwidths
    latency_ms: float  # one way, once per message
    latency_spread: float
    jitter_ms: float  # standard deviation of a message's latency
    loss: float = 0.0  # share of packets


@dataclass(frozen=True)
class DeviceProfile:
    """Medians of a kind of computer."""

    speed: float  # of training, as a multiple of the device of `network.ms_per_example`
    spread: float
    memory_gib: float
    memory_spread: float


LINKS = {
    # down: Norway 3G; up: mahimahi; spread: ln(2.5 / 0.8) over 2.56, from Norway 3G; rest chosen
    "3g": LinkProfile(1.3, 0.95, 0.44, 100.0, 0.3, 25.0),
    # down, spread: China 2021; up, latency: world 2020, mobile; rest chosen
    "4g": LinkProfile(26.1, 11.2, 1.57, 40.0, 0.3, 10.0),
    # down, spread: China 2021; up: world 2021; rest chosen
    "5g": LinkProfile(313.0, 21.0, 1.35, 20.0, 0.3, 5.0),
    # down, spread: China 2021, WiFi 5; up, latency: world 2020, fixed; rest chosen
    "wifi": LinkProfile(178.0, 45.7, 1.08, 21.0, 0.3, 5.0),
    "fibre": LinkProfile(500.0, 500.0, 0.3, 5.0, 0.2, 0.5),  # chosen
    "edge_box": LinkProfile(1000.0, 1000.0, 0.1, 2.0, 0.1, 0.1),  # chosen: a wired office
    "datacenter": LinkProfile(10_000.0, 10_000.0, 0.0, 0.1, 0.0, 0.0),  # chosen
}
DEVICES = {
    "phone": DeviceProfile(1.0, 0.6, 4.0, 0.4),  # the reference; spread: FedScale; memory chosen
    "laptop": DeviceProfile(4.0, 0.4, 8.0, 0.4),  # chosen
    "gpu": DeviceProfile(100.0, 0.2, 24.0, 0.4),  # chosen
}


def wrong_shares(shares: dict[str, Any], profiles: list[str]) -> Iterator[str]:
    """What is wrong with the shares of a mixture of profiles."""
    for name, share in shares.items():
        if name not in profiles:
            near = difflib.get_close_matches(name, profiles, 1) or profiles
            yield f"there is no profile {name!r}; did you mean {' or '.join(near)}?"
        elif type(share) not in (int, float) or not 0 <= share <= 1:
            yield f"{name}: {share!r} is not a share, a number from 0 to 1"
    if shares and all(type(share) in (int, float) for share in shares.values()):
        if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
            yield f"the shares sum to {sum(shares.values()):g}, not to 1"
