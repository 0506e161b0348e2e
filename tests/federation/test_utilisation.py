"""utilisation.py, on rounds of few messages whose times are added up by hand."""

import pytest
from helpers.runs import ledger, rounds

from federation.ledger import LedgerRow
from federation.utilisation import utilisation


def row(client: int, direction: str, start: float, seconds: float) -> LedgerRow:
    ends = ("server", str(client)) if direction == "down" else (str(client), "server")
    return LedgerRow(1, direction, *ends, "update", 8, 8, 2, start, seconds)


# From 10 s to 20 s. Client 0 receives for 1 s, computes for 2 s and sends for 1 s, in two messages.
# Client 7 receives for 2 s, computes for 5 s and sends for 3 s.
CHAIN_0 = [row(0, "down", 10, 1), row(0, "up", 13, 0.5), row(0, "up", 13.5, 0.5)]
CHAIN_7 = [row(7, "down", 10, 2), row(7, "up", 17, 3)]


def test_who_waited_for_whom_and_what_was_busy():
    assert utilisation([*CHAIN_7, *CHAIN_0[::-1]], [0, 7], [], 10.0, 20.0) == {
        "waited_for": "7",
        "waited_seconds": 6.0,
        "link_utilisation": pytest.approx((0.2 + 0.5) / 2),
        "device_utilisation": pytest.approx((0.2 + 0.5) / 2),
    }


def test_edge_servers_are_no_clients():
    alone = utilisation(CHAIN_0, [0], [], 10.0, 20.0)
    hop = LedgerRow(1, "down", "server", "edge0", "model", 8, 8, 2, 10, 9)
    assert utilisation([*CHAIN_0, hop], [0], [], 10.0, 20.0) == alone


def test_nobody_waits_for_those_that_do_not_count():
    cut_off = [row(3, "down", 10, 4), row(3, "up", 18, 2)]
    row_ = utilisation([*CHAIN_0, *cut_off, *CHAIN_7[:1]], [0], [3, 7], 10.0, 20.0)
    assert (row_["waited_for"], row_["waited_seconds"]) == ("0", 0)
    assert row_["link_utilisation"] == pytest.approx((0.2 + 0.6 + 0.2) / 3)
    # Client 7 received and sent nothing: nobody knows how long it computed.
    assert row_["device_utilisation"] == pytest.approx((0.2 + 0.4) / 2)


def test_a_mask_is_agreed_on_before_the_first_round():
    chain = [row(0, "down", 0, 1), row(0, "up", 2, 1), row(0, "down", 3, 1), row(0, "up", 7, 1)]
    found = utilisation(chain, [0], [], 0.0, 10.0)
    assert (found["link_utilisation"], found["device_utilisation"]) == (0.4, 0.4)


def test_work_that_reaches_over_the_ends_of_a_round_counts_within_it():
    rows = [row(0, "up", 12, 1)]  # it received in an earlier round
    rows += [row(1, "down", 9, 2)]  # it sends in a later one
    found = utilisation(rows, [0], [], 10.0, 20.0)
    assert found["link_utilisation"] == pytest.approx((0.1 + 0.1) / 2)
    assert found["device_utilisation"] == pytest.approx((0.2 + 0.9) / 2)


def test_a_round_of_which_nothing_came_has_nobody_to_wait_for():
    found = utilisation(CHAIN_0[:1], [], [0], 10.0, 20.0)
    assert (found["waited_for"], found["waited_seconds"]) == (None, 0)
    assert (found["link_utilisation"], found["device_utilisation"]) == (0.1, None)
    assert utilisation([], [], [], 10.0, 10.0)["link_utilisation"] is None


def test_equal_clients_wait_for_nobody_and_are_busy_all_the_time(run):
    _, folder = run("rounds=2", "network.ms_per_example=10")
    for entry in rounds(folder):
        assert entry["waited_seconds"] == pytest.approx(0, abs=1e-3)
        busy = entry["link_utilisation"] + entry["device_utilisation"]
        assert busy == pytest.approx(1, abs=0.01)
        assert entry["late"] == []
        # Two steps on 16 pictures take 320 ms.
        assert entry["device_utilisation"] == pytest.approx(0.32 / entry["simulated_seconds"])
        senders = {r["sender"] for r in ledger(folder) if r["round"] == str(entry["round"])}
        assert entry["waited_for"] in senders - {"server"}
