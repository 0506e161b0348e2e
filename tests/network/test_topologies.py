"""network/topologies.py: the closed forms by hand and against the event clock."""

import numpy as np
import pytest
from helpers.populations import MBPS, population

from network.simulation import Simulation, Stage
from network.topologies import (
    gossip_seconds,
    gossip_stages,
    hierarchical_seconds,
    hierarchical_stages,
    ingress_seconds,
    message_seconds,
    ring_seconds,
    ring_stages,
    star_seconds,
)

RATE = 10 * MBPS  # ten bytes of payload per second


def lasts(chains, uplink, downlink=None, latency_ms=0.0, ingress_mbps=None):
    """When the last of the chains ends, each of its own client."""
    people = population(uplink, downlink, latency_ms=latency_ms)
    simulation = Simulation(people, ingress_mbps=ingress_mbps)
    for client, stages in enumerate(chains):
        simulation.start(client, stages)
    while simulation.advance():
        pass
    return simulation.now


def test_a_message():
    assert message_seconds(50, RATE, 250.0) == pytest.approx(0.25 + 5.0)
    assert message_seconds(1448, 1.0, 0.0) == pytest.approx(8 * 1514 / 1e6)


def test_a_star_waits_for_its_slowest_client():
    up, down, latency = np.array([10.0, 2.0]), np.array([20.0, 8.0]), np.array([100.0, 500.0])
    computing = np.array([9.0, 1.0])
    # 0.1 + 2 + 9 + 0.1 + 1 = 12.2 and 0.5 + 5 + 1 + 0.5 + 5 = 12
    seconds = star_seconds(40, 10, down * MBPS, up * MBPS, latency, computing)
    assert seconds == pytest.approx(12.2)
    chains = [[Stage("down", 40), Stage("compute", seconds=c), Stage("up", 10)] for c in computing]
    assert lasts(chains, up, down, latency) == pytest.approx(seconds)


def test_a_server_takes_in_one_message_after_the_other():
    assert ingress_seconds(5, 20, RATE) == pytest.approx(10.0)
    chains = [[Stage("up", 20)]] * 5
    assert lasts(chains, [100.0] * 5, ingress_mbps=RATE) == pytest.approx(10.0)


def test_edge_servers_send_to_the_cloud_after_k2_rounds():
    # 3 * (2*4 + 0.5 + 50/10) + 1 + 50/100
    seconds = hierarchical_seconds(50, 4.0, 2, 3, (RATE, 500.0), (10 * RATE, 1000.0))
    assert seconds == pytest.approx(42.0)
    below = lasts([hierarchical_stages(50, 4.0, 2, 3)], [10.0], latency_ms=500.0)
    above = lasts([[Stage("up", 50)]], [100.0], latency_ms=1000.0)
    assert below + above == pytest.approx(seconds)


@pytest.mark.parametrize("num_nodes, seconds", [(1, 0.0), (2, 2 * 5.5), (4, 6 * 3.0)])
def test_a_ring(num_nodes, seconds):
    assert ring_seconds(num_nodes, 100, RATE, 500.0) == pytest.approx(seconds)
    chains = [ring_stages(num_nodes, 100)] * num_nodes
    assert lasts(chains, [10.0] * num_nodes, latency_ms=500.0) == pytest.approx(seconds)


def test_a_part_of_a_ring_is_rounded_up():
    assert ring_stages(3, 100) == [Stage("up", 34)] * 4


def test_gossip():
    assert gossip_seconds(3, 100, RATE, 500.0) == pytest.approx(31.5)
    assert lasts([gossip_stages(3, 100)] * 2, [10.0] * 2, latency_ms=500.0) == pytest.approx(31.5)
