"""bounded.py: the bound."""

import pytest
from helpers.payloads import cases
from hypothesis import given, settings

from compression import encode


@pytest.mark.parametrize("eps", [0.5, 0.3, 0.25, 0.1, 0.01, 1e-3, 1 / 32000])
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_bounded_keeps_its_bound_to_the_last_bit(eps, case):
    vector, layout, _ = case
    sent = encode(vector, layout, f"bounded({eps})")[1].dense().double()
    exact = vector.double()  # differences of float32 numbers of like size are exact in float64
    if len(exact):
        assert bool(((sent - exact).abs() <= eps * exact.abs().max()).all())
