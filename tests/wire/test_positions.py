"""positions.py: positions as a payload of their own, against the second decoder."""

import numpy as np
import pytest
import torch
from helpers import naive_decoder
from hypothesis import given, settings
from hypothesis import strategies as st

from compression import decode, encode
from layout import Layout
from wire.container import OVERHEAD, PayloadError, pack
from wire.positions import encode_positions, pack_positions, unpack_positions

LAYOUT = Layout(("w", "b", "v"), ((100, 90), (100,), (10, 100)))
SMALL = Layout(("a", "b", "c"), ((5, 3), (), (21,)))
TENSORS = list(zip(SMALL.names, SMALL.shapes, strict=True))


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 36)))
def test_positions_alone_against_the_second_decoder(chosen):
    payload = pack_positions(np.array(sorted(chosen), np.int64), SMALL)
    assert len(payload) <= OVERHEAD + 5  # 37 bits
    assert payload[5] == 4 and payload[7] == 0
    assert payload[8:16] == naive_decoder.fingerprint(TENSORS)
    bits = "".join(f"{byte:08b}" for byte in payload[24:-8])
    assert payload[6] == 1 and [i for i, bit in enumerate(bits) if bit == "1"] == sorted(chosen)
    assert unpack_positions(payload, SMALL).tolist() == sorted(chosen)


def test_few_positions_are_rice_codes():
    positions = np.array([3, 9000, 9999])
    payload = pack_positions(positions, LAYOUT)
    assert payload[6] == 0 and len(payload) == OVERHEAD + len(encode_positions(positions, LAYOUT))
    sizes = LAYOUT.sizes.tolist()
    read, _ = naive_decoder.read_positions(naive_decoder.Body(payload[24:-8]), sizes)
    assert read == unpack_positions(payload, LAYOUT).tolist() == positions.tolist()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(-3, 45), max_size=8))
def test_positions_that_do_not_ascend_within_the_layout_are_refused(positions):
    indices = np.array(positions, np.int64)
    if positions == sorted({*positions}) and all(0 <= i < 37 for i in positions):
        body = naive_decoder.Body(encode_positions(indices, SMALL))
        assert naive_decoder.read_positions(body, SMALL.sizes.tolist())[0] == positions
    else:
        with pytest.raises(ValueError, match="must ascend"):
            encode_positions(indices, SMALL)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_positions_of_a_stranger_are_refused_or_ascending(data):
    coder, flags = (data.draw(st.sampled_from([0, 0, 0, 1, 2])) for _ in range(2))
    body = data.draw(st.binary(min_size=4, max_size=40))
    selection = data.draw(st.sampled_from([4, 4, 4, 0]))
    try:
        positions = unpack_positions(pack(selection, coder, SMALL, body, flags=flags), SMALL)
    except PayloadError:
        return
    assert selection == 4 and not flags
    assert np.array_equal(np.unique(positions), positions)
    assert not len(positions) or 0 <= positions[0] <= positions[-1] < 37


def test_a_payload_of_positions_is_no_update_and_the_other_way_round():
    with pytest.raises(PayloadError, match="no selection has the number 4"):
        decode(pack_positions(np.arange(3), SMALL), SMALL)
    with pytest.raises(PayloadError, match="announces no positions"):
        unpack_positions(encode(torch.zeros(37), SMALL)[0], SMALL)
