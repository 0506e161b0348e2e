"""network/clock.py: its formulas by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from network.clock import Device, Link, client_timeline

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


def test_a_clients_messages_go_one_after_the_other_around_its_training():
    # A second of 10^6 bits either way, half a second of latency: 125,000 bytes take 1.5 s
    link = Link(uplink_mbps=1.0, downlink_mbps=2.0, latency_ms=500.0)
    messages = [("down", 250_000), ("down", 0), ("up", 125_000), ("up", 12_500)]
    times, done = client_timeline(messages, link, computing=3.0)
    assert [*map(sum, times)] == pytest.approx([1.5, 2.0, 6.5, 7.1])  # when each has arrived
    assert [start for start, _ in times] == pytest.approx([0.0, 1.5, 5.0, 6.5])
    assert done == pytest.approx(1.5 + 0.5 + 3.0 + 1.5 + 0.6)


@pytest.mark.parametrize("computing", [0.0, 2.5])
def test_a_client_computes_after_what_it_receives_and_before_what_it_sends(computing):
    assert client_timeline([], LINK, computing) == ([], computing)
    [(start, seconds)], done = client_timeline([("down", 1_250_000)], LINK, computing)
    assert (start, seconds, done) == pytest.approx((0.0, 0.25, 0.25 + computing))
    [(start, seconds)], done = client_timeline([("up", 1_250_000)], LINK, computing)
    assert (start, seconds, done) == pytest.approx((computing, 1.05, computing + 1.05))


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


sizes = st.lists(st.integers(0, 2**40), max_size=5)


@settings(deadline=None)
@given(links, sizes, sizes, st.floats(0, 1e6))
def test_messages_never_overlap_and_all_of_them_fit(link, downs, ups, computing):
    messages = [("down", size) for size in downs] + [("up", size) for size in ups]
    times, done = client_timeline(messages, link, computing)
    assert [seconds for _, seconds in times] == [link.seconds(n, way) for way, n in messages]
    ends = [0.0, *(start + seconds for start, seconds in times)]
    starts = [*(start for start, _ in times), done]
    gaps = [start - end for start, end in zip(starts, ends, strict=True)]
    idle = [computing if place == len(downs) else 0.0 for place in range(len(gaps))]
    assert gaps == pytest.approx(idle, rel=1e-6, abs=1e-6 * (1 + done))
