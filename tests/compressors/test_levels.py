"""levels.py: which of several ways to write levels is taken."""

import numpy as np
import torch
from helpers.vectors import flat, noise

from compression import encode
from layout import Layout


def test_sparse_levels_are_coded_where_that_is_shorter():
    vector = noise(20_000)
    vector[torch.from_numpy(np.random.default_rng(1).choice(20_000, 400, replace=False))] *= 1000
    for word in ("bounded(0.05)", "ternary", "qsgd4"):
        dense = vector if word != "ternary" else vector * (vector.abs() > 100)
        payload, sent = encode(dense, flat(len(dense)), word)
        assert payload[5] == 2 and len(payload) < 20_000 / 8 and (sent.values != 0).all()
    payload, _ = encode(noise(20_000), flat(20_000), "ternary")
    assert payload[5] == 0


def test_packed_values_are_compressed_where_that_is_shorter():
    layout = Layout(("a", "b"), ((4000,), (4000,)))
    vector = torch.cat((torch.full((4000,), 1.0), noise(4000)))
    payload, _ = encode(vector, layout, "int8")
    assert payload[7] == 1 and len(payload) < 6000
    payload, _ = encode(torch.rand(500, generator=torch.Generator()), flat(500), "int8")
    assert payload[7] == 0
