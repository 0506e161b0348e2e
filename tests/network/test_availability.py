"""network/availability.py: on and off by hand, and shares over many clients."""

import math

import numpy as np
import pytest

from network.availability import Availability, Diurnal, Traced, dropouts, read_intervals
from network.draws import uniform

CLIENTS = np.arange(20_000)


def phases(seed: int) -> np.ndarray:
    return uniform(seed, "availability", CLIENTS)


def test_always():
    always = Availability()
    assert always.is_there(CLIENTS[:3], 5.0).tolist() == [True] * 3
    assert always.leaves(CLIENTS[:3], 5.0).tolist() == [math.inf] * 3


@pytest.mark.parametrize("seconds", [0.0, 1234.5, 1e7])
@pytest.mark.parametrize("share", [0.2, 0.9, 1.0])
def test_by_day_a_share_of_the_clients_is_there(seconds, share):
    daily = Diurnal(86_400.0, share, phases(3))
    there = daily.is_there(CLIENTS, seconds)
    assert there.mean() == pytest.approx(share, abs=0.01)
    comes, leaves = daily.comes(CLIENTS, seconds), daily.leaves(CLIENTS, seconds)
    assert (comes[there] == seconds).all() and (comes[~there] > seconds).all()
    assert (leaves[~there] == seconds).all() and (leaves[there] > seconds).all()
    assert comes.max() <= seconds + (1 - share) * 86_400 + 1e-6
    if share == 1:
        assert np.isinf(leaves).all()
    else:
        assert leaves.max() <= seconds + share * 86_400 + 1e-6


def test_who_has_come_is_there_and_who_has_left_is_not():
    daily = Diurnal(100.0, 0.25, phases(1))
    for seconds in (0.0, 33.3, 1e6):
        for client in range(200):
            comes = float(daily.comes([client], seconds)[0])
            assert daily.is_there([client], comes).all()
            leaves = float(daily.leaves([client], comes)[0])
            # it came at or before `seconds`, or has its whole time before it
            assert comes == seconds or leaves - comes == pytest.approx(25.0)
            assert not daily.is_there([client], leaves + 1e-6).any()
            assert daily.is_there([client], leaves - 1e-6).all()
            assert daily.is_there([client], leaves - 1e-6 + 100).all()  # every period alike


def test_a_trace_says_when_each_comes_and_leaves(tmp_path):
    path = tmp_path / "there.csv"
    path.write_text("client,from,to\n2,10,20\n0,0,1.5\n0,1.5,2\n2,30,40\n")
    traced = Traced(read_intervals(path, 4))
    clients = np.arange(4)
    assert traced.comes(clients, 0.0).tolist() == [0.0, math.inf, 10.0, math.inf]
    assert traced.comes(clients, 1.75).tolist() == [1.75, math.inf, 10.0, math.inf]
    assert traced.comes(clients, 20.0).tolist() == [math.inf, math.inf, 30.0, math.inf]
    assert traced.comes(clients, 1e9).tolist() == [math.inf] * 4
    assert traced.leaves(clients, 1.0).tolist() == [1.5, 1.0, 1.0, 1.0]
    assert traced.leaves(clients, 35.0).tolist() == [35.0, 35.0, 40.0, 35.0]
    assert traced.is_there(clients, 10.0).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    "text, line, reason",
    [
        ("", 1, "the column client is missing"),
        ("client,from,to\n", 1, "no client is ever there"),
        ("client,from,to\n0,1\n", 2, "not 3 values"),
        ("client,from,to\n0,1,2,3\n", 2, "not 3 values"),
        ("client,from,to\n0,1,x\n", 2, "'0,1,x' is not three numbers"),
        ("client,from,to\n0,1,inf\n", 2, "is not three numbers"),
        ("client,from,to\n4,1,2\n", 2, "no client 4: clients.total=4"),
        ("client,from,to\n0,2,1\n", 2, "must go forward"),
        ("client,from,to\n0,-1,1\n", 2, "must go forward"),
        ("client,from,to\n0,1,1e12\n", 2, "must go forward"),
        ("client,from,to\n0,1,3\n1,0,9\n0,2,4\n", 4, "client 0: its times must go forward"),
    ],
)
def test_a_wrong_file_is_answered_with_its_line(tmp_path, text, line, reason):
    path = tmp_path / "there.csv"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_intervals(path, 4)
    assert str(error.value).startswith(f"{path}:{line}: ") and reason in str(error.value)


def test_a_client_drops_out_of_a_round_with_the_probability_at_any_moment():
    moments = dropouts(0.3, seed=5, round_number=2, clients=CLIENTS)
    dropped = moments < math.inf
    assert dropped.mean() == pytest.approx(0.3, abs=0.01)
    assert 0 < moments.min() and moments[dropped].max() < 1
    assert moments[dropped].mean() == pytest.approx(0.5, abs=0.015)
    assert np.isinf(dropouts(0.0, 5, 2, CLIENTS)).all()
    assert (dropouts(1.0, 5, 2, CLIENTS) < 1).all()
    again = dropouts(0.3, 5, 2, CLIENTS[7:9])
    assert again.tolist() == moments[7:9].tolist()
    both = np.isfinite(dropouts(0.3, 5, 3, CLIENTS)) & dropped  # rounds are independent
    assert both.mean() == pytest.approx(0.09, abs=0.01)
