"""network/simulation.py: by hand, against small time steps, and what must hold always."""

import json
import math
import time

import numpy as np
import pytest
from helpers.populations import MBPS, population
from hypothesis import given, settings
from hypothesis import strategies as st

from network.simulation import Simulation, Span, Stage
from network.trace import Trace


def down(num_bytes, seconds=0.0):
    return Stage("down", num_bytes, seconds)


def compute(seconds):
    return Stage("compute", seconds=seconds)


def up(num_bytes, seconds=0.0):
    return Stage("up", num_bytes, seconds)


def run(simulation):
    """All chains to their ends: {client: when}."""
    ends = {}
    while end := simulation.advance():
        ends[end.client] = end.time
    return ends


# --- by hand --------------------------------------------------------------------------------------


def test_a_client_alone_goes_through_its_stages():
    simulation = Simulation(population([100.0], [1000.0], latency_ms=500.0))
    stages = [down(2000), down(0), compute(4.0), up(300)]
    simulation.start(0, stages, at=10.0)
    assert simulation.advance() == pytest.approx((20.5, 0, True))
    expected = [
        Span(0, 0, "down", 10.0, 12.5, 2000),
        Span(0, 1, "down", 12.5, 13.0, 0),
        Span(0, 2, "compute", 13.0, 17.0, 0),
        Span(0, 3, "up", 17.0, 20.5, 300),
    ]
    assert simulation.spans == expected
    assert simulation.seconds_alone(0, stages) == pytest.approx(10.5)
    assert simulation.advance() is None and simulation.under_way == []


def test_a_byte_of_payload_takes_its_headers_with_it():
    """1448 bytes travel in a frame of 1514: 12.112 ms at 1 Mbit/s."""
    simulation = Simulation(population([1 / MBPS]))  # 1 Mbit/s
    simulation.start(0, [up(1448)])
    assert simulation.advance().time == pytest.approx(8 * 1514 / 1e6)


def test_the_server_is_shared_max_min_fair():
    """Ingress 12: client 0 has 2 alone, the others share 10 and then have more as they end."""
    simulation = Simulation(population([2.0, 8.0, 100.0]), ingress_mbps=12 * MBPS)
    for client, num_bytes in enumerate([20, 25, 95]):
        simulation.start(client, [up(num_bytes)])
    # to 5 s: 2, 5, 5; to 10 s: 2, -, 10; after it: 12 alone, for the last 20 bytes
    assert run(simulation) == pytest.approx({1: 5.0, 0: 10.0, 2: 10 + 20 / 12})


def test_directions_do_not_share():
    simulation = Simulation(population([10.0, 10.0]), egress_mbps=10 * MBPS, ingress_mbps=10 * MBPS)
    simulation.start(0, [up(100)])
    simulation.start(1, [down(100)])
    assert run(simulation) == pytest.approx({0: 10.0, 1: 10.0})


def test_a_chain_is_stopped_where_it_stands():
    simulation = Simulation(population([10.0, 10.0, 10.0], latency_ms=1000.0), 15 * MBPS, 15 * MBPS)
    simulation.start(0, [up(100)], stop_at=5.0)
    simulation.start(1, [up(100)])
    simulation.start(2, [compute(1.0), up(70)], stop_at=1.5)
    assert simulation.advance() == (1.5, 2, False)  # in the latency of its message
    assert simulation.advance() == (5.0, 0, False)  # four seconds at 7.5
    assert simulation.advance(until=6.0) is None
    assert simulation.now == 6.0 and simulation.under_way == [1]
    assert simulation.stop(1) == (6.0, 1, False)
    spans = [Span(2, 0, "compute", 0, 1, 0), Span(2, 1, "up", 1, 1.5, 0)]
    spans += [Span(0, 0, "up", 0, 5, 30), Span(1, 0, "up", 0, 6, 40)]
    assert simulation.spans == spans
    simulation.start(1, [up(10)])  # and may start again, also in the middle of a run
    assert simulation.advance().time == pytest.approx(8.0)


def test_a_chain_that_ends_with_its_stop_is_complete_and_one_that_has_not_begun_has_no_span():
    simulation = Simulation(population([10.0, 10.0]))
    simulation.start(0, [compute(1.0), up(10)], stop_at=2.0)
    simulation.start(1, [up(10)], at=3.0)
    assert simulation.advance() == (2.0, 0, True)
    assert simulation.stop(1) == (2.0, 1, False)
    assert [span.client for span in simulation.spans] == [0, 0]
    simulation.start(0, [], at=4.0)
    assert simulation.advance() == (4.0, 0, True)


def test_coding_that_overlaps_hides_behind_the_upload_or_the_upload_behind_it():
    for coding, seconds in [(2.0, 10.0), (30.0, 30.0)]:
        simulation = Simulation(population([10.0]))
        simulation.start(0, [up(100, coding)])
        assert simulation.advance().time == pytest.approx(seconds)
        assert simulation.seconds_alone(0, [up(100, coding)]) == pytest.approx(seconds)


def test_seconds_alone_of_many_clients_are_those_that_each_takes_on_the_clock():
    rng = np.random.default_rng(0)
    people = population(*rng.uniform(1, 50, (2, 20)), latency_ms=rng.uniform(0, 99, 20), loss=0.01)
    seconds = rng.uniform(0, 5, 20)
    simulation = Simulation(people, egress_mbps=20 * MBPS, ingress_mbps=30 * MBPS)
    alone = simulation.seconds_alone(np.arange(20), [down(50), compute(seconds), up(70)])
    for client in range(20):
        begin = simulation.now
        simulation.start(client, [down(50), compute(seconds[client]), up(70)])
        assert simulation.advance().time - begin == pytest.approx(alone[client])


def test_loss_limits_a_flow_as_mathis_says():
    """RTT 0.2 s, loss 0.01: 1448 * sqrt(3/2) / (0.2 * 0.1) bytes a second."""
    simulation = Simulation(population([1e9, 1e9], latency_ms=100.0, loss=[0.01, 0.0]))
    for client in (0, 1):
        simulation.start(client, [up(1_000_000)])
    rate = 1448 * math.sqrt(1.5) / (0.2 * 0.1)
    assert run(simulation) == pytest.approx({0: 0.1 + 1e6 / rate, 1: 0.1 + 1e6 / 1e9})


def test_each_message_has_its_own_jitter_from_the_seed():
    def latencies(seed):
        simulation = Simulation(
            population([1.0] * 400, latency_ms=100.0, jitter_ms=20.0), seed=seed
        )
        for client in range(400):
            simulation.start(client, [down(0), up(0)])
        run(simulation)
        return np.array([span.end - span.start for span in sorted(simulation.spans)])

    first = latencies(1)
    assert np.array_equal(first, latencies(1)) and not np.isin(first, latencies(2)).any()
    assert first.mean() == pytest.approx(0.1, abs=0.003)
    assert first.std() == pytest.approx(0.02, abs=0.002)
    assert abs(np.corrcoef(first[::2], first[1::2])[0, 1]) < 0.2


def test_a_latency_is_never_below_zero():
    simulation = Simulation(population([1.0], latency_ms=1.0, jitter_ms=1000.0))
    simulation.start(0, [down(0)] * 50)
    run(simulation)
    spans = [span.end - span.start for span in simulation.spans]
    assert min(spans) == 0.0 < max(spans)


def test_a_client_has_one_chain_and_time_does_not_go_back():
    simulation = Simulation(population([1.0]))
    simulation.start(0, [up(10)])
    with pytest.raises(ValueError, match="client 0 is under way"):
        simulation.start(0, [])
    simulation.advance()
    with pytest.raises(ValueError, match="times go back"):
        simulation.start(0, [], at=9.0)
    with pytest.raises(ValueError, match="times go back"):
        simulation.start(0, [], at=12.0, stop_at=11.0)


def test_a_simulation_goes_on_from_its_state_to_the_bit():
    def simulate():
        trace = Trace(np.array([3, 50, 420, 1000]))
        people = population([5e4] * 9, latency_ms=70.0, jitter_ms=30.0, downlink_trace=trace)
        return Simulation(people, ingress_mbps=2e5 * MBPS, seed=2)

    whole, first, second = simulate(), simulate(), simulate()
    for simulation in (whole, first):
        for client in np.arange(8):
            stages = [down(3000 + client), compute(0.1 * client), up(40_000)]
            simulation.start(client, stages, at=0.3 * client, stop_at=2.8 if client % 2 else 9e9)
    ends = [whole.advance() for _ in range(8)]
    begun = [first.advance(), first.advance()]
    first.advance(until=(ends[1].time + ends[2].time) / 2)
    second.load(json.loads(json.dumps(first.state())))
    assert [*begun, *(second.advance() for _ in range(6))] == ends
    assert first.spans + second.spans == whole.spans
    assert second.advance() is None and {end.is_complete for end in ends} == {True, False}


# --- links with a trace ---------------------------------------------------------------------------


def traced(stamps, num_clients=1):
    trace = Trace(np.array(stamps))
    return trace, population([1.0] * num_clients, uplink_trace=trace, seed=3)


def test_a_flow_over_a_trace_ends_when_the_trace_has_carried_it():
    """A packet at the end of every step of the trace carries 1500 bytes with their headers."""
    _, people = traced([100, 200, 300])
    simulation = Simulation(people)
    simulation.start(0, [up(1448 * 10)])
    share = (1448 / 1514) * 1500  # of the payload in a packet of the trace
    assert simulation.advance().time == pytest.approx(0.1 * 1448 * 10 / share)


def test_a_flow_waits_where_a_trace_carries_nothing():
    trace, people = traced([10_000] * 50)  # all within one step of each 10 seconds
    simulation = Simulation(people, ingress_mbps=1e6)
    simulation.start(0, [up(round(1448 / 1514 * 1500 * 25))])
    end = simulation.advance().time
    assert end % 10 == pytest.approx((end // 0.1 + 0.5) * 0.1 % 10, abs=0.01)  # half a step
    assert end <= 10 and trace.num_steps == 100


def test_clients_are_spread_over_a_trace():
    trace, people = traced(range(1, 60_001), 50)
    steps = {Simulation(people)._first_step(client, trace) for client in range(50)}
    assert len(steps) > 40 and min(steps) < 100 and max(steps) > 500


# --- against small time steps ---------------------------------------------------------------------

CASES, CLIENTS, STAGES, STEP = 1000, 4, 3, 2e-3
KINDS = ["down", "compute", "up"]


def random_cases(rng):
    """A table of amounts (bytes or seconds), and links; a case is a row."""
    shape = (CASES, CLIENTS)
    return {
        "kinds": rng.integers(0, 3, (*shape, STAGES)),
        "amounts": rng.integers(0, 5, (*shape, STAGES)) * 0.2,  # 1 byte per second is usual
        "fastest": rng.choice([0.5, 1.0, 2.0, 4.0], (*shape, 2)),  # down, up
        "latency": rng.choice([0.0, 0.1, 0.3], shape),
        "starts": rng.choice([0.0, 0.0, 0.25, 0.6], shape),
        "stops": rng.choice([1.1, np.inf, np.inf, np.inf], shape),
        "servers": rng.choice([1.0, 2.0, 3.0, np.inf], (CASES, 2)),  # egress, ingress
    }


def fair_by_filling(fastest, wants, capacity):
    """Max-min fair rates by filling: the rest goes in equal parts to those who can take more."""
    rates = np.zeros_like(fastest)
    for _ in range(CLIENTS):
        hungry = wants & (rates < fastest - 1e-12)
        left = np.where(np.isinf(capacity), 1e9, capacity) - rates.sum(1)
        part = left / np.maximum(1, hungry.sum(1))
        rates += np.where(hungry, np.minimum(fastest - rates, part[:, None]), 0.0)
    return rates


def in_small_steps(cases):
    """Every client of every case moved on by small steps: when each ends, and its bytes by then."""
    rows, columns = np.ogrid[:CASES, :CLIENTS]
    stage = np.zeros((CASES, CLIENTS), int)
    waited = np.zeros((CASES, CLIENTS))  # of a latency or of computing
    sent = np.zeros((CASES, CLIENTS))  # bytes of the stage
    total = np.zeros((CASES, CLIENTS))  # of the stages before it
    ends = np.full((CASES, CLIENTS), np.inf)
    for now in STEP * np.arange(1, 20_000):
        active = (now > cases["starts"] + STEP / 2) & np.isinf(ends)
        place = np.minimum(stage, STAGES - 1)
        kind, amount = (cases[key][rows, columns, place] for key in ("kinds", "amounts"))
        waits = np.where(kind == 1, amount, cases["latency"])
        is_waiting = active & (waited < waits - STEP / 2)
        waited += STEP * is_waiting
        for way, pipe in ((0, 0), (2, 1)):
            flows = active & ~is_waiting & (kind == way)
            fastest = cases["fastest"][:, :, pipe] * flows
            sent += STEP * fair_by_filling(fastest, flows, cases["servers"][:, pipe])
        done = active & np.where(kind == 1, waited >= waits - STEP / 2, ~is_waiting)
        done &= (kind == 1) | (sent >= amount - 1e-9)
        total += np.where(done & (kind != 1), amount, 0)
        stage, waited, sent = stage + done, np.where(done, 0, waited), np.where(done, 0, sent)
        ends = np.where(done & (stage == STAGES), now, ends)
        ends = np.where((now > cases["stops"] - STEP / 2) & np.isinf(ends), now, ends)
        if not np.isinf(ends).any():
            return ends, total + sent
    raise AssertionError("the cases do not end")


UNITS = 10**6  # whole bytes of the simulation in a byte of the small steps


def by_events(cases, case):
    up_rates, down_rates = cases["fastest"][case, :, 1], cases["fastest"][case, :, 0]
    latency = 1e3 * cases["latency"][case]
    people = population(UNITS * up_rates, UNITS * down_rates, latency_ms=latency)
    servers = [None if np.isinf(s) else UNITS * s * MBPS for s in cases["servers"][case]]
    simulation = Simulation(people, *servers)
    for client in range(CLIENTS):
        pairs = zip(cases["kinds"][case, client], cases["amounts"][case, client], strict=True)
        stages = [
            compute(amount) if kind == 1 else Stage(KINDS[kind], round(UNITS * amount))
            for kind, amount in pairs
        ]
        start, stop = cases["starts"][case, client], cases["stops"][case, client]
        simulation.start(client, stages, start, stop)
    ends = run(simulation)
    return [ends[client] for client in range(CLIENTS)], simulation


def test_events_equal_small_time_steps_on_a_thousand_cases():
    cases = random_cases(np.random.default_rng(11))
    expected, carried = in_small_steps(cases)
    # A step rounds the end of each of 12 stages and 12 latencies up; they can delay each other.
    tolerance = STEP * 2 * CLIENTS * STAGES
    stopped = 0
    for case in range(CASES):
        ends, simulation = by_events(cases, case)
        assert ends == pytest.approx(expected[case].tolist(), abs=tolerance)
        for client in range(CLIENTS):
            spans = sorted(span for span in simulation.spans if span.client == client)
            assert [span.stage for span in spans] == [*range(len(spans))]
            assert all(a.end == b.start for a, b in zip(spans, spans[1:], strict=False))
            num_bytes = sum(span.num_bytes for span in spans) / UNITS
            fastest = cases["fastest"][case, client].max()
            assert num_bytes == pytest.approx(carried[case, client], abs=fastest * tolerance)
            stopped += len(spans) < STAGES
    assert stopped > 300


# --- what must hold always ------------------------------------------------------------------------


amounts, rates = st.integers(0, 10**9), st.floats(1.0, 1e9)


@settings(deadline=None)
@given(amounts, st.integers(0, 10**9), rates, st.floats(1.0, 10.0), st.floats(0, 1e3))
def test_alone_more_bytes_or_less_bandwidth_never_end_earlier(size, more, rate, slower, latency):
    def lasts(num_bytes, fastest):
        simulation = Simulation(population([fastest], latency_ms=latency))
        simulation.start(0, [down(num_bytes), up(num_bytes)])
        return simulation.advance().time

    seconds = lasts(size, rate)
    assert lasts(size + more, rate) >= seconds
    assert lasts(size, rate / slower) >= seconds


def test_where_links_are_shared_more_bytes_or_less_bandwidth_can_end_another_client_earlier():
    """What keeps client 0 from the server's ingress leaves it to client 1."""

    def end_of_client_1(num_bytes, fastest):
        simulation = Simulation(population([fastest, 10.0]), ingress_mbps=10 * MBPS)
        simulation.start(0, [down(num_bytes), up(100)])
        simulation.start(1, [up(100)])
        return run(simulation)[1]

    assert end_of_client_1(0, 10.0) == pytest.approx(20.0)
    assert end_of_client_1(100, 10.0) == pytest.approx(10.0)  # more bytes
    assert end_of_client_1(0, 2.0) == pytest.approx(12.5)  # less bandwidth


def test_a_cohort_costs_no_more_among_more_clients():
    def seconds(num_clients):
        people = population(np.full(num_clients, 1e6), latency_ms=10.0)
        begin = time.perf_counter()
        simulation = Simulation(people, ingress_mbps=100 * 1e6 * MBPS)
        for client in range(200):
            simulation.start(client, [down(1_000_000), compute(client / 1e3), up(10_000)])
        assert len(run(simulation)) == 200
        return time.perf_counter() - begin

    few = min(seconds(200) for _ in range(3))
    many = min(seconds(200_000) for _ in range(3))
    assert many < 3 * few + 0.01  # a step for each client would take ten times as long
