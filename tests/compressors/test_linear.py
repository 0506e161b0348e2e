"""linear.py: int<n> by hand and from its definition."""

import struct

import numpy as np
import pytest
import torch
from helpers.payloads import cases, picking
from helpers.vectors import arrived, noise
from hypothesis import given, settings

from compression import encode
from layout import Layout


@pytest.mark.parametrize("bits", range(2, 17))
def test_linear_values_are_off_by_half_a_step_at_most(bits):
    vector = noise(1000)
    step = float(vector.abs().max()) / (2 ** (bits - 1) - 1)
    assert float((arrived(vector, f"int{bits}") - vector).abs().max()) <= step / 2 * (1 + 1e-3)


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_int8_is_the_nearest_of_255_levels_per_tensor(case):
    vector, layout, _ = case
    sent = encode(vector, layout, "int8")[1].dense().double().numpy()
    for start, stop in zip(layout.offsets[:-1], layout.offsets[1:], strict=True):
        values = vector[start:stop].double().numpy()
        largest = np.abs(values).max(initial=0.0)
        # half a step, a rounding error, and the coarseness of a denormal scale
        allowed = largest / 254 * (1 + 1e-5) + 127 * 2.0**-149
        assert (np.abs(sent[start:stop] - values) <= allowed).all()
        assert np.abs(sent[start:stop]).max(initial=0.0) <= largest


def test_int8_by_hand():
    layout = Layout(("a", "b"), ((4,), (3,)))
    vector = torch.tensor([127.0, 2.5, 3.5, -0.4, 3.0, -254.0, 0.3])
    payload, sent = encode(vector, layout, "int8")
    assert sent.values.tolist() == [127, 2, 4, 0, 4, -254, 0]  # a half goes to the even level
    assert payload[24:40] == struct.pack("<Bff7b", 8, 1.0, 2.0, 127, 2, 4, 0, 2, -127, 0)


def test_int8_scale_is_rounded_down_so_that_nothing_arrives_larger_than_it_was():
    below_a_tenth = np.nextafter(np.float32(0.1), np.float32(0))
    vector = torch.tensor([12.7])  # the float32 nearest to 12.7 / 127 is 0.1, and 127 * 0.1 > 12.7
    payload, sent = encode(vector, Layout(("w",), ((1,),)), "int8")
    assert payload[25:29] == below_a_tenth.tobytes()
    assert sent.values[0] == np.float32(127) * below_a_tenth < np.float32(12.7)


@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_selected_int8_is_the_nearest_of_255_levels_of_the_selection(case):
    vector, layout, _ = case
    select = picking(np.arange(layout.size))
    sent = encode(vector, layout, "int8", select)[1].dense().double().numpy()
    values = vector.double().numpy()
    largest = np.abs(values).max(initial=0.0)
    allowed = largest / 254 * (1 + 1e-5) + 127 * 2.0**-149
    assert (np.abs(sent - values) <= allowed).all()
    assert np.abs(sent).max(initial=0.0) <= largest
