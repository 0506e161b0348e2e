"""network.py: its formulas by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from network.clock import Device, Link, round_seconds

LINK = Link(uplink_mbps=10.0, downlink_mbps=50.0, latency_ms=50.0)


def test_a_message_takes_its_latency_and_its_bits():
    # 1,250,000 bytes are 10 million bits: one second up at 10 Mbit/s, a fifth of it down at 50
    assert LINK.seconds(1_250_000, "up") == pytest.approx(1.05)
    assert LINK.seconds(1_250_000, "down") == pytest.approx(0.25)
    assert LINK.seconds(0, "up") == LINK.seconds(0, "down") == 0.05
    assert Link(1e-3, 1.0, 0.0).seconds(125, "up") == pytest.approx(1.0)


def test_a_direction_is_up_or_down():
    with pytest.raises(KeyError):
        LINK.seconds(1, "sideways")


def test_a_device_takes_its_time_for_each_example():
    assert Device(ms_per_example=5.0).seconds(200) == pytest.approx(1.0)
    assert Device(ms_per_example=0.0).seconds(200) == Device(5.0).seconds(0) == 0.0


def test_a_round_lasts_as_long_as_its_slowest_client():
    assert round_seconds([1.0, 3.5, 2.0]) == 3.5
    assert round_seconds(iter([0.25])) == 0.25
    assert round_seconds([]) == 0.0


positive = st.floats(1e-3, 1e5)
links = st.builds(Link, positive, positive, st.floats(0, 1e4))


@settings(deadline=None)
@given(links, st.integers(0, 2**40), st.integers(1, 2**40), st.sampled_from(["up", "down"]))
def test_more_bytes_take_longer_and_a_faster_link_less(link, num_bytes, more, direction):
    seconds = link.seconds(num_bytes, direction)
    assert link.latency_ms / 1e3 <= seconds <= link.seconds(num_bytes + more, direction)
    twice = Link(2 * link.uplink_mbps, 2 * link.downlink_mbps, link.latency_ms)
    travelling = seconds - link.latency_ms / 1e3
    halved = twice.seconds(num_bytes, direction) - link.latency_ms / 1e3
    assert halved == pytest.approx(travelling / 2, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e9), min_size=1), st.randoms())
def test_a_round_does_not_depend_on_the_order_of_clients(seconds, random):
    shuffled = random.sample(seconds, len(seconds))
    assert round_seconds(shuffled) == round_seconds(seconds) == sorted(seconds)[-1]
