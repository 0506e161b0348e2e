"""ternary.py, by hand."""

import torch
from helpers.payloads import picking
from helpers.vectors import arrived, flat

from compression import encode


def test_ternary_by_hand():
    vector = torch.tensor([4.0, 0.0, -1.0, 0.0, -1.0])
    assert arrived(vector, "ternary").tolist() == [2, 0, -2, 0, -2]
    chosen = encode(vector, flat(5), "ternary", picking([0, 1, 2]))[1]
    assert chosen.indices.tolist() == [0, 2] and chosen.values.tolist() == [2.5, -2.5]
