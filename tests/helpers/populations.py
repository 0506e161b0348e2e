"""Clients whose links are given by hand."""

import numpy as np

from network.pipe import PAYLOAD_SHARE
from network.population import Population

MBPS = 8 / PAYLOAD_SHARE / 1e6  # a link of so many Mbit/s carries a byte of payload per second


def population(uplink, downlink=None, **columns) -> Population:
    """Clients with these links, in bytes of payload per second; all else is 0 unless given."""
    uplink = np.array(uplink, np.float64)
    downlink = uplink if downlink is None else np.array(downlink, np.float64)
    for name in ("latency_ms", "jitter_ms", "loss", "ms_per_example", "memory_gib"):
        columns[name] = np.broadcast_to(np.float64(columns.get(name, 0.0)), uplink.shape)
    names = np.full(len(uplink), "hand")
    return Population(MBPS * uplink, MBPS * downlink, link=names, device=names, **columns)
