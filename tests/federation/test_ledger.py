"""ledger.py: a message becomes a row, by name."""

from dataclasses import asdict

import pytest
from helpers.runs import ledger

from federation.ledger import LedgerRow, ledger_row
from federation.messages import SERVER, Message

COLUMNS = "round direction sender receiver kind bytes dense_bytes num_values start seconds".split()


def test_a_message_up_is_a_row_by_name():
    message = Message(
        kind="update",
        sender=7,
        receiver=SERVER,
        payload=b"12345",
        num_bytes=5,
        num_values=3,
        dense_values=100,
    )
    assert asdict(ledger_row(message, round_number=2, start=1.5, seconds=0.25)) == {
        "round": 2,
        "direction": "up",
        "sender": "7",
        "receiver": "server",
        "kind": "update",
        "bytes": 5,
        "dense_bytes": 400,
        "num_values": 3,
        "start": 1.5,
        "seconds": 0.25,
    }


def test_a_message_down_is_a_row_whose_payload_may_be_gone():
    message = Message("mask", SERVER, 0, None, num_bytes=9, num_values=4, dense_values=0)
    row = ledger_row(message, 0, 0.0, 0.5)
    assert (row.direction, row.sender, row.receiver) == ("down", "server", "0")
    assert (row.round, row.kind, row.bytes, row.dense_bytes, row.num_values) == (0, "mask", 9, 0, 4)


def test_a_row_is_written_and_read_by_the_names_of_its_fields(run):
    assert list(LedgerRow.__dataclass_fields__) == COLUMNS
    _, folder = run("rounds=2")
    assert (folder / "ledger.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    rows = ledger(folder)
    assert len(rows) == 2 * 3 * 2
    for row in rows:
        ends = {row["sender"], row["receiver"]}
        assert "server" in ends and len(ends) == 2
        assert (row["direction"] == "up") == (row["receiver"] == "server")


def test_a_row_says_when_its_message_was_on_the_way(run):
    """Down from the start of the round, up once the client has trained; rounds follow another."""
    words = ["rounds=2", "network.latency_ms=1000", "network.ms_per_example=10"]
    words += ["network.uplink_mbps=1", "network.downlink_mbps=2"]
    _, folder = run(*words)
    ends = {}
    for row in ledger(folder):
        client = row["sender"] if row["direction"] == "up" else row["receiver"]
        start, seconds = float(row["start"]), float(row["seconds"])
        mbps = 1 if row["direction"] == "up" else 2
        assert seconds == pytest.approx(1 + 8 * int(row["bytes"]) * 1514 / 1448 / (mbps * 1e6))
        if row["direction"] == "down":
            began = max((end for key, end in ends.items() if key[0] == "1"), default=0.0)
            assert start == pytest.approx(began if row["round"] == "2" else 0.0)
        else:  # two steps on 16 pictures take 320 ms
            assert start == pytest.approx(ends[row["round"], client] + 0.32)
        ends[row["round"], client] = start + seconds
