"""sign.py, by hand."""

import numpy as np
import torch
from helpers.payloads import picking
from helpers.vectors import arrived, flat

from compression import encode


def test_sign_by_hand():
    vector = torch.tensor([4.0, 0.0, -1.0, 0.0, -1.0])
    values = [float(np.float32(1.2)) * sign for sign in (1, 1, -1, 1, -1)]
    assert arrived(vector, "sign").tolist() == values
    chosen = encode(vector, flat(5), "sign", picking([0, 1, 2]))[1]
    assert chosen.indices.tolist() == [0, 1, 2]
    np.testing.assert_allclose(chosen.values, [5 / 3, 5 / 3, -5 / 3], rtol=2e-7)
