"""messages.py: what goes from rank to rank is what comes out, payloads to the byte."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.messages import (
    SERVER,
    Broadcast,
    Message,
    Report,
    pack_reports,
    unpack_reports,
)

counts = st.integers(0, 2**40)


@st.composite
def reports(draw):
    """One client's report: failed or not, with payloads that travel and some that do not."""
    client = draw(st.integers(0, 10**6))
    messages = []
    for kind in draw(st.lists(st.sampled_from(["update", "control", "buffers"]), unique=True)):
        payload = draw(st.binary(max_size=50))
        travels = draw(st.booleans())
        message = Message(
            kind, client, SERVER, payload, len(payload), draw(counts), dense_values=draw(counts)
        )
        messages.append(message if travels else replace(message, payload=None))
    downs = draw(st.lists(st.sampled_from(["model", "model_change", "mask"]), max_size=2))
    received = [
        Message(kind, SERVER, client, None, draw(counts), draw(counts), draw(counts))
        for kind in downs
    ]
    floats = st.floats(allow_nan=False)
    return Report(
        client,
        draw(counts),
        draw(floats),
        draw(floats),
        draw(counts),
        draw(st.text()),
        draw(st.booleans()),
        received,
        messages,
    )


def blob_of(some: list[Report]) -> memoryview:
    return memoryview(b"".join(pack_reports(some)))


@settings(deadline=None)
@given(st.lists(reports(), max_size=4))
def test_what_was_packed_is_unpacked(some):
    unpacked = unpack_reports(blob_of(some))
    assert unpacked == some
    assert all(m.direction == "up" for r in unpacked for m in r.messages)
    assert all(m.direction == "down" for r in unpacked for m in r.received)


@settings(deadline=None)
@given(st.lists(reports(), max_size=4))
def test_a_blob_is_its_head_and_the_payloads(some):
    """Nothing of the payloads is in the head, and nothing is between them."""
    blob = bytes(blob_of(some))
    length = int.from_bytes(blob[:8], "little")
    payloads = [m.payload for r in some for m in r.messages if m.payload is not None]
    assert blob[8 + length :] == b"".join(payloads)
    assert len(json.loads(blob[8 : 8 + length])) == len(some)


def test_a_payload_is_not_copied_on_arrival():
    message = Message("update", 3, SERVER, b"abc", 3, 1, 1)
    blob = blob_of([Report(3, 10, messages=[message])])
    [report] = unpack_reports(blob)
    assert isinstance(report.messages[0].payload, memoryview)
    assert report.messages[0].payload.obj is blob.obj


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_arrives_as_it_is(loss):
    [report] = unpack_reports(blob_of([Report(0, 1, loss=loss)]))
    assert report.loss == loss or math.isnan(loss) and math.isnan(report.loss)


def test_a_message_goes_up_to_the_server_and_down_from_it():
    assert Message("update", 3, SERVER, b"", 0, 0, 0).direction == "up"
    assert Message("model", SERVER, 3, b"", 0, 0, 0).direction == "down"


def test_a_report_that_fails_sends_nothing_and_says_why():
    received = [Message("model", SERVER, 3, None, 3, 1, 1)]
    report = Report(3, 10, received=received)
    report.messages = [Message("update", 3, SERVER, b"abc", 3, 1, 1)]
    report.fail("it fell over")
    assert report.failure == "it fell over" and report.messages == []
    assert report.received == received


def test_a_report_without_its_payloads_keeps_their_lengths():
    message = Message("update", 3, SERVER, b"abc", 3, 1, 7)
    report = Report(3, 10, loss=0.5, messages=[message])
    bare = report.without_payloads()
    assert bare == replace(report, messages=[replace(message, payload=None)])
    assert bare.messages[0].num_bytes == 3 and report.messages == [message]


def test_a_broadcast_brings_each_client_its_own_copy():
    def bring(client, copy):
        before = torch.zeros(2) if copy is None else copy
        return before + client, Message("model_change", SERVER, client, b"abc", 3, 1, 1)

    common = {3: [Message("mask", SERVER, 3, b"", 0, 0, 0)], 5: []}
    broadcast = Broadcast(torch.ones(2), None, torch.ones(1), 4, common, bring)
    first, second = broadcast.of(3), broadcast.of(5, torch.ones(2))
    assert first.parameters.tolist() == [3, 3] and second.parameters.tolist() == [6, 6]
    assert [m.kind for m in first.messages[3]] == ["mask", "model_change"]
    assert [m.receiver for m in second.messages[5]] == [5]
    assert first.of(3) is first and common[5] == []
