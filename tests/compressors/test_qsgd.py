"""qsgd.py, from the page of the format."""

import math

import numpy as np
import pytest
from helpers import naive_decoder
from helpers.vectors import arrived, noise


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_qsgd_is_what_the_page_says(bits):
    vector, seed = noise(1300), 77
    steps, expected = 2 ** (bits - 1) - 1, []
    for i, value in enumerate(vector.tolist()):
        start = i // 512 * 512
        largest = float(vector[start : start + 512].abs().max())
        scale = np.float32(largest / steps)
        if float(scale) * steps > largest:
            scale = np.nextafter(scale, np.float32(0))
        uniform = (naive_decoder.random_number(seed, i) >> 11) / 2**53
        level = min(math.floor(abs(value) / float(scale) + uniform), steps)
        expected.append(float(np.float32(level) * scale) * (1 if value > 0 else -1))
    assert arrived(vector, f"qsgd{bits}", seed).tolist() == expected
