"""composition.py: the parts of a payload and the bytes of its tensors, by every coder."""

import numpy as np
import pytest
import torch

from compression import OVERHEAD, composition, encode, parse_coder
from layout import Layout

# Large enough that the first values of a tensor, from which an adaptive code learns, matter little.
LAYOUT = Layout(("w", "b", "v"), ((64, 32, 3, 3), (10,), (100, 128)))
VECTOR = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(0))
BOTH = "positions and values"
WORDS = [
    "fp32",
    "fp16",
    "bf16",
    "int8",
    "qsgd4",
    "ternary",
    "sign",
    "eden2",
    "means2",
    "bounded(0.01)",
]


def some(vector, _) -> np.ndarray:
    """The tenth of the positions with the largest magnitude."""
    return np.sort(np.argsort(-vector.abs().numpy())[: len(vector) // 10])


def described(word: str, select=None, dense_below: int = 0, vector=VECTOR):
    payload, sent = encode(vector, LAYOUT, word, select, dense_below)
    parts, by_tensor = composition(payload, LAYOUT, parse_coder(word))
    assert sum(parts.values()) == len(payload) and parts["header"] == OVERHEAD
    assert list(by_tensor) == list(LAYOUT.names)
    return parts, by_tensor, sent


@pytest.mark.parametrize("word", [*WORDS, "powersgd(2)", "eden(0.1)"])
def test_a_whole_vector_has_no_positions(word):
    parts, by_tensor, _ = described(word)
    values = parts.get("values", 0) + parts.get(BOTH, 0)
    assert parts.keys() <= {"header", "values", BOTH} and len(parts) == 2
    assert sum(by_tensor.values()) == pytest.approx(values, rel=0.05)


@pytest.mark.parametrize("word", WORDS)
def test_selected_values_have_positions(word):
    parts, by_tensor, _ = described(word, some)
    assert (BOTH in parts) != ({"positions", "values"} <= parts.keys())
    body = sum(parts.values()) - OVERHEAD
    assert sum(by_tensor.values()) == pytest.approx(body, rel=0.05)
    assert by_tensor["w"] > 1.2 * by_tensor["v"] > by_tensor["b"]


@pytest.mark.parametrize(("word", "width"), [("fp32", 4), ("fp16", 2)])
def test_plain_values_take_their_width(word, width):
    parts, by_tensor, _ = described(word)
    assert parts == {"header": OVERHEAD, "values": width * LAYOUT.size}
    assert list(by_tensor.values()) == [width * size for size in LAYOUT.sizes]
    parts, _, sent = described(word, some)
    assert parts["values"] == width * len(sent.values)


def test_factors_take_their_rank():
    rows, columns = 64, 32 * 9
    _, by_tensor, _ = described("powersgd(2)")
    head = 2  # bytes that say the rank
    assert by_tensor["w"] == head + 4 * 2 * (rows + columns)
    assert by_tensor["b"] == head + 4 * 10
    assert by_tensor["v"] == head + 4 * 2 * (100 + 128)


@pytest.mark.parametrize("word", ["fp16", "int8", "eden2"])
def test_small_tensors_are_a_part_of_their_own(word):
    parts, by_tensor, _ = described(word, some, dense_below=11)
    assert parts["small tensors"] == 4 + 4 * 10 and by_tensor["b"] == 4 * 10


@pytest.mark.parametrize("word", WORDS)
def test_a_vector_of_zeros_is_described_too(word):
    described(word, some, vector=torch.zeros(LAYOUT.size))


def test_a_tensor_of_which_a_mask_leaves_nothing_is_described_too():
    layout = LAYOUT.on(np.arange(64 * 32 * 9))  # w alone
    for word in WORDS:
        payload, _ = encode(VECTOR[: layout.size], layout, word)
        parts, by_tensor = composition(payload, layout, parse_coder(word))
        assert sum(parts.values()) == len(payload) and by_tensor["w"] > 30 * by_tensor["b"]
