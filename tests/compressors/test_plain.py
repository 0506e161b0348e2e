"""plain.py: rounding against the definition of each format."""

import struct

import pytest
import torch
from helpers.payloads import finite, moderate, same_bits
from helpers.vectors import flat
from hypothesis import given, settings
from hypothesis import strategies as st

from compression import encode


def round_fp16(value: float) -> float:
    clamped = min(max(value, -65504.0), 65504.0)
    return struct.unpack("<e", struct.pack("<e", clamped))[0]


def round_bf16(value: float) -> float:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    sign, bits = bits & 0x80000000, bits & 0x7FFFFFFF
    rounded = min((bits + 0x7FFF + (bits >> 16 & 1)) >> 16, 0x7F7F)
    return struct.unpack("<f", struct.pack("<I", sign | rounded << 16))[0]


@pytest.mark.parametrize(("kind", "reference"), [("fp16", round_fp16), ("bf16", round_bf16)])
@settings(max_examples=60, deadline=None)
@given(values=st.lists(finite | moderate | st.floats(60000, 70000, width=32), max_size=40))
def test_halves_round_to_nearest_even_and_clamp(kind, reference, values):
    _, sent = encode(torch.tensor(values), flat(len(values)), kind)
    assert same_bits(sent.values, [reference(value) for value in values])
