"""How long a round takes in four topologies, in closed form, where all links are alike.

Symbols: S bytes of a message, B bytes of payload per second of a link, alpha its latency, c seconds
of computing. A node sends its messages one after the other. The `*_stages` give the same work to
the event clock, as the chain of one node; the formulas are exact where no link is shared.
"""

import numpy as np

from network.pipe import payload_rate
from network.simulation import Stage


def message_seconds(num_bytes: float, mbps: float, latency_ms: float) -> float:
    """alpha + S/B: what a message takes that has its link for itself."""
    return latency_ms / 1e3 + num_bytes / payload_rate(mbps)


def star_seconds(
    down_bytes: float,
    up_bytes: float,
    downlink_mbps: np.ndarray,
    uplink_mbps: np.ndarray,
    latency_ms: np.ndarray,
    computing: np.ndarray,
) -> float:
    """max_i(alpha_i + S_down/B_down,i + c_i + alpha_i + S_up/B_up,i), for an unlimited server.

    Arrays have one entry for each client.
    """
    down = message_seconds(down_bytes, downlink_mbps, latency_ms)
    up = message_seconds(up_bytes, uplink_mbps, latency_ms)
    return float(np.max(down + computing + up))


def ingress_seconds(num_clients: int, num_bytes: float, ingress_mbps: float) -> float:
    """n*S/B: no star is faster than its server takes in n messages of S bytes."""
    return num_clients * num_bytes / payload_rate(ingress_mbps)


def hierarchical_seconds(
    num_bytes: float,
    computing: float,
    local_rounds: int,
    edge_rounds: int,
    edge: tuple[float, float],
    cloud: tuple[float, float],
) -> float:
    """k2*(k1*c + alpha_e + S/B_e) + alpha_c + S/B_c (Liu, Zhang, Song and Letaief 2020).

    A client computes k1 = local_rounds times for `computing` seconds and sends to its edge server;
    after k2 = edge_rounds of this the edge server sends to the cloud. edge, cloud: mbps and
    latency_ms.
    """
    round_at_edge = local_rounds * computing + message_seconds(num_bytes, *edge)
    return edge_rounds * round_at_edge + message_seconds(num_bytes, *cloud)


def hierarchical_stages(
    num_bytes: int, computing: float, local_rounds: int, edge_rounds: int
) -> list[Stage]:
    """A client's work below its edge server; the message to the cloud takes another link."""
    training = Stage("compute", seconds=local_rounds * computing)
    return [training, Stage("up", num_bytes)] * edge_rounds


def ring_seconds(num_nodes: int, num_bytes: float, mbps: float, latency_ms: float) -> float:
    """2(n-1)*alpha + 2(n-1)/n * S/B: reduce-scatter, then all-gather (Patarasuk and Yuan 2009)."""
    return 2 * (num_nodes - 1) * message_seconds(num_bytes / num_nodes, mbps, latency_ms)


def ring_stages(num_nodes: int, num_bytes: int) -> list[Stage]:
    """What a node sends to its neighbour: 2(n-1) messages of an n-th each.

    The parts of a vector that n does not divide differ by one byte, and each step lasts as long as
    its largest one.
    """
    return [Stage("up", -(-num_bytes // num_nodes))] * (2 * (num_nodes - 1))


def gossip_seconds(degree: int, num_bytes: float, mbps: float, latency_ms: float) -> float:
    """degree*(alpha + S/B): a node sends its message to each of its neighbours."""
    return degree * message_seconds(num_bytes, mbps, latency_ms)


def gossip_stages(degree: int, num_bytes: int) -> list[Stage]:
    return [Stage("up", num_bytes)] * degree
