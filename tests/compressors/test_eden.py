"""eden.py: against the paper, Lloyd and Max, and a golden payload."""

import math

import numpy as np
import pytest
import torch
from helpers import naive_decoder
from helpers.vectors import arrived, flat, noise
from hypothesis import given, settings
from hypothesis import strategies as st

from compression import encode
from compressors.eden import CENTROIDS, blocks


@pytest.mark.parametrize(("bits", "published"), [(1, 0.571), (2, 0.133), (3, 0.0358), (4, 0.0096)])
@pytest.mark.parametrize("heavy", [False, True])
def test_the_error_of_eden_is_the_published_one(bits, published, heavy):
    """arXiv 2108.08842: vNMSE of .571, .133, .0358 and .0096, here within 2%."""
    vector = noise(20 * 8192 + 4096)
    vector = vector**5 if heavy else vector
    error = (arrived(vector, f"eden{bits}", 9).double() - vector.double()).square().sum()
    assert float(error / vector.double().square().sum()) == pytest.approx(published, rel=0.02)


def lloyd_max(bits: int) -> list[float]:
    """The positive values of the best quantiser of N(0, 1), by Lloyd's iteration."""

    def pdf(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def cdf(x: float) -> float:
        return math.erf(x / math.sqrt(2)) / 2

    values = [0.3 * (2 * i + 1) for i in range(2 ** (bits - 1))]
    for _ in range(3000):
        edges = [0.0, *((a + b) / 2 for a, b in zip(values, values[1:], strict=False)), 40.0]
        cells = zip(edges, edges[1:], strict=False)
        values = [(pdf(a) - pdf(b)) / (cdf(b) - cdf(a)) for a, b in cells]
    return values


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_centroids_are_those_of_lloyd_and_max(bits):
    np.testing.assert_allclose(CENTROIDS[bits], lloyd_max(bits), rtol=2e-7)
    written = [float(x) for x in naive_decoder.POSITIVE_CENTROIDS[bits].split()]
    assert list(CENTROIDS[bits]) == written


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 100_000))
def test_blocks_need_no_padding(count):
    sizes = blocks(count).tolist()
    assert sizes == naive_decoder.blocks_of(count) and 0 <= count - sum(sizes) < 16
    assert sizes == sorted(sizes, reverse=True)


def test_a_block_of_zeros_arrives_as_zeros_and_short_vectors_unchanged():
    vector = torch.cat((torch.zeros(8192), noise(8192)))
    assert torch.equal(arrived(vector, "eden2")[:8192], torch.zeros(8192))
    assert torch.equal(arrived(noise(15), "eden1"), noise(15))


def test_eden_golden_bytes():
    payload, _ = encode(torch.arange(17.0) - 8, flat(17), "eden2", seed=1)
    assert payload[24:].hex() == GOLDEN


GOLDEN = "020100000000000000b26cba3e5ad853aa000000412f9aeb28ddf746be"
