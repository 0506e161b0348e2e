"""means.py: by hand, against a plain split, and what a stranger may not send."""

import numpy as np
import pytest
import torch
from helpers import naive_decoder
from helpers.payloads import picking, read_naively
from helpers.vectors import arrived, flat, noise

from compression import PayloadError, decode, encode
from layout import Layout
from wire.container import pack

TWO = Layout(("a", "hollow", "b"), ((2, 3), (0, 4), (5,)))


def split(magnitudes: np.ndarray, times: int) -> np.ndarray:
    """Each magnitude's mean of the part that it is in, by recursion."""
    if not len(magnitudes) or not times:
        return np.full(len(magnitudes), magnitudes.mean() if len(magnitudes) else 0.0)
    above, out = magnitudes > magnitudes.mean(), np.empty(len(magnitudes))
    for part in (above, ~above):
        out[part] = split(magnitudes[part], times - 1)
    return out


def test_two_bits_by_hand():
    vector = torch.tensor([1.0, -1.0, 4.0, -1.0, 8.0, 3.0])  # a mean magnitude of 3
    assert arrived(vector, "means2").tolist() == [1.5, -1.5, 6.0, -1.5, 6.0, 1.5]
    assert arrived(vector, "means3").tolist() == [1.0, -1.0, 4.0, -1.0, 8.0, 3.0]
    chosen = encode(vector, flat(6), "means2", picking([1, 2, 4]))[1]
    assert chosen.indices.tolist() == [1, 2, 4]
    assert chosen.values.tolist() == [-2.5, 2.5, 8.0]  # a mean of 13 / 3


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("picked", [None, np.arange(0, 3000, 7)])
def test_each_tensor_is_split_by_itself(bits, picked):
    layout = Layout(("a", "b"), ((1000,), (2000,)))
    vector = torch.cat([noise(1000), 100 * noise(2000, 1) ** 3])
    sent = encode(vector, layout, f"means{bits}", picking(picked))[1].dense().numpy()
    exact = np.zeros(3000) if picked is not None else vector.double().numpy()
    if picked is not None:
        exact[picked] = vector.double().numpy()[picked]
    for part in (slice(0, 1000), slice(1000, 3000)):
        here = np.flatnonzero(exact[part])
        values = exact[part][here]
        expected = np.sign(values) * split(np.abs(values), bits - 1)
        np.testing.assert_allclose(sent[part][here], expected, rtol=1e-6)


def test_a_level_of_normal_numbers_errs_as_lloyd_and_max_say():
    """Max 1960, table I: four levels .1175, eight .03454, sixteen .009497; ours are near these."""
    vector = noise(100_000)
    for bits, least in ((2, 0.1175), (3, 0.03454), (4, 0.009497)):
        lost = float(
            (arrived(vector, f"means{bits}") - vector).square().sum() / vector.square().sum()
        )
        assert least < lost < 1.5 * least


def test_selected_zeros_are_left_out_and_tensors_without_levels_have_no_table():
    vector = torch.zeros(TWO.size)
    vector[[7, 9]] = torch.tensor([2.0, -2.0])
    payload, sent = encode(vector, TWO, "means2", picking(range(TWO.size)))
    assert sent.indices.tolist() == [7, 9] and sent.values.tolist() == [2.0, -2.0]
    assert payload[24:29].hex() == "0201000000"  # two bits, one table
    nothing, sent = encode(torch.zeros(TWO.size), TWO, "means2", picking(range(TWO.size)))
    assert len(sent.indices) == 0 and nothing[24:29].hex() == "0200000000"


@pytest.mark.parametrize(
    ("bits", "num_tables", "message"),
    [
        (0, 1, "values of 0 bits are not of kind 8"),
        (5, 1, "values of 5 bits are not of kind 8"),
        (2, 3, "3 tables are more than there are tensors"),
        (2, 2, "2 tables for 1 tensors"),
        (2, 0, "0 tables for 1 tensors"),
        (1, 1, "levels of up to 2 where at most 1 is due"),
    ],
)
def test_what_a_stranger_may_not_send(bits, num_tables, message):
    vector = torch.zeros(TWO.size)
    vector[6:] = torch.tensor([1.0, -1.0, 2.0, 5.0, -6.0])
    code = bytes(encode(vector, TWO, "means2", picking(range(6, 11)))[0])[24 + 5 + 8 : -8]
    head = bytes([bits]) + num_tables.to_bytes(4, "little")
    tables = np.ones(num_tables * 2**bits // 2, "<f4").tobytes()
    payload = pack(2, 8, TWO, head + tables, code)
    with pytest.raises(PayloadError, match=message):
        decode(payload, TWO)
    with pytest.raises(naive_decoder.Refused):
        read_naively(payload, TWO)
