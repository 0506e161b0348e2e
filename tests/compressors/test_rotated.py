"""rotated.py: the rate, the error and the bias that its docstring promises."""

import math

import numpy as np
import pytest
import torch
from helpers import naive_decoder
from helpers.payloads import seal
from helpers.vectors import arrived, flat, noise
from hypothesis import given, settings
from hypothesis import strategies as st

from compression import OVERHEAD, PayloadError, decode, encode, parse_coder
from compressors.rotated import SIXTHS, blocks, threshold_of
from layout import Layout

RATES = [0.01, 0.03, 0.1, 0.3, 1.0]


def gaussian(threshold: float) -> tuple[float, float]:
    """(bits a value, relative error) of the quantiser of N(0, 1), by numerical integration."""
    x = np.linspace(threshold, threshold + 12, 400_001)
    density = 2 * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    p, first = np.trapezoid(density, x), np.trapezoid(density * x, x)
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    return entropy + p, p / first**2 - 1  # 1 / (p c^2) - 1, where c is first / p


@pytest.mark.parametrize("rate", RATES)
def test_threshold_and_variance_are_those_of_a_normal_distribution(rate):
    bits, error = gaussian(float(threshold_of(rate)))
    assert bits == pytest.approx(rate, rel=2e-3)
    assert parse_coder(f"eden({rate})").variance == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("heavy", [False, True])
def test_error_and_bytes_are_those_of_a_normal_distribution(rate, heavy):
    vector = noise(4 * 32768)
    vector = vector**5 if heavy else vector  # then blocks differ, and the split saves some
    word, errors, sizes = f"eden({rate})", [], []
    for seed in range(6):
        payload, sent = encode(vector, flat(len(vector)), word, seed=seed)
        errors.append(float((sent.dense() - vector).square().sum() / vector.square().sum()))
        sizes.append(8 * (len(payload) - OVERHEAD - 8 - 2 * 4))
    variance = parse_coder(word).variance
    assert (0.9 if heavy else 0.97) * variance < np.mean(errors) < 1.04 * variance
    heads = 8 * 9 / len(vector)  # of the positions
    assert np.mean(sizes) / len(vector) == pytest.approx(rate + heads, rel=0.1 if heavy else 0.06)


def test_it_needs_a_third_less_than_the_signs_of_a_random_part():
    """At equal bytes, and against one bit of a random 3%: (1 + 0.571) / 0.03 - 1."""
    spread = 1 + parse_coder("eden(0.03)").variance
    assert spread < 0.66 * 1.571 / 0.03


def test_bits_go_where_the_larger_values_are():
    """The error is that of the best split: in proportion to size x deviation."""
    layout = Layout(("large", "small"), ((65536,), (32768,)))
    vector = torch.cat((noise(65536), 10 * noise(32768, 1)))
    error = np.mean(
        [float((arrived(vector, "eden(0.1)", s, layout) - vector).square().sum()) for s in range(8)]
    )
    equal = parse_coder("eden(0.1)").variance * float(vector.square().sum())
    best = (65536 + 10 * 32768) ** 2 / (98304 * (65536 + 100 * 32768))
    assert error == pytest.approx(best * equal, rel=0.05)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 200_000))
def test_blocks_cover_all_and_few_more(count):
    sizes = blocks(count).tolist()
    assert sizes == naive_decoder.padded_blocks_of(count)
    assert 0 <= sum(sizes) - count < max(16, min(512, count)) or count == 0


def test_gains_are_sixth_roots():
    np.testing.assert_allclose(SIXTHS, [2 ** (k / 6) for k in range(6)], rtol=1e-7)
    assert SIXTHS == naive_decoder.SIXTH_ROOTS


@pytest.mark.parametrize("vector", [torch.zeros(3000), torch.zeros(0), torch.full((9,), 3.4e38)])
def test_zeros_stay_zeros_and_the_largest_numbers_are_finite(vector):
    sent = arrived(vector, "eden(0.1)", 5)
    assert torch.isfinite(sent).all() and (bool(sent.any()) == bool(vector.any()))


def test_a_wrong_code_or_scale_is_refused():
    layout, vector = flat(40), noise(40)
    payload = bytearray(encode(vector, layout, "eden(0.1)")[0])
    at = 24 + 8 + 2  # the container's head, the seed, one scale
    for position, byte, message in (
        (at, 7, "marks are written in code 7"),
        (at - 1, 0x80, "a scale is"),
    ):
        wrong = bytearray(payload)
        wrong[position] = byte
        with pytest.raises(PayloadError, match=message):
            decode(seal(wrong), layout, "eden(0.1)")
