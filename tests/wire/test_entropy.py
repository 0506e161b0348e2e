"""wire/entropy.py: round trips, the naive decoder, golden bytes, and a stranger's bytes."""

import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import naive_decoder
from helpers.payloads import mutate, picking, read_naively, same_bits, seal
from hypothesis import given, settings
from hypothesis import strategies as st

from compression import decode, encode
from layout import Layout
from wire.container import PayloadError, pack
from wire.entropy import decode_integers, encode_integers
from wire.range_coder import varint
from wire.walk import MAX_LEVEL

ROOT = Path(__file__).parents[2]


def layout_of(*shapes: tuple[int, ...]) -> Layout:
    return Layout(tuple(f"t{i}" for i in range(len(shapes))), shapes)


def check(vector: np.ndarray, layout: Layout) -> bytes:
    """Encode the entries of an integer vector that are not zero; both decoders must find them."""
    indices = np.flatnonzero(vector)
    body = encode_integers(indices, vector[indices], layout)
    positions, levels = decode_integers(body, layout)
    assert positions.dtype == np.int64
    np.testing.assert_array_equal(positions, indices)
    np.testing.assert_array_equal(levels, vector[indices])
    naive = naive_decoder.read_levels(body, list(layout.shapes))
    assert naive == dict(zip(indices.tolist(), vector[indices].tolist(), strict=True))
    return body


@st.composite
def cases(draw):
    """Small layouts of all kinds, in which tensors of equal shape often have equal content."""
    kinds = [(), (0,), (3, 0), (1,), (9,), (4, 3), (3, 4), (1, 5), (5, 1), (3, 4, 1, 1)]
    kinds += [(4, 3, 3, 3), (2, 3, 5, 4), (3, 2, 1, 4), (3, 2, 2, 2), (5, 4, 3), (2, 2, 2, 3, 3)]
    kinds += [(2, 0, 3, 3), (2, 2, 0), (1, 1, 0), (0, 2, 3), (40, 2, 3, 3)]
    layout = layout_of(*draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=6)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0]))
    least = draw(st.sampled_from([1, 2, 40, MAX_LEVEL]))
    largest = min(MAX_LEVEL, least + draw(st.sampled_from([0, 1, 90, 30000])))
    vector = rng.integers(least, largest + 1, layout.size) * rng.choice([-1, 1], layout.size)
    vector[rng.random(layout.size) >= density] = 0
    if draw(st.booleans()):
        seen = {}
        for begin, end in pairwise(layout.offsets):
            vector[begin:end] = seen.setdefault(end - begin, vector[begin:end].copy())
    return vector, layout


@settings(max_examples=150, deadline=None)
@given(cases())
def test_round_trip_and_the_naive_decoder_agrees(case):
    check(*case)


@pytest.mark.parametrize("shapes", [(), ((0,), (3, 0)), ((7,), (4, 3), (2, 3, 3, 3))])
def test_nothing_is_one_byte(shapes):
    layout = layout_of(*shapes)
    assert check(np.zeros(layout.size, np.int64), layout) == b"\0"


def test_one_level_at_every_position():
    layout = layout_of((3, 2, 3, 3), (4, 3), (), (5,), (2, 2, 2, 2))
    for position in range(layout.size):
        vector = np.zeros(layout.size, np.int64)
        vector[position] = -3
        assert len(check(vector, layout)) < 12


@pytest.mark.parametrize("level", [1, -127, MAX_LEVEL])
def test_a_full_vector_of_one_level_costs_nearly_nothing(level):
    layout = layout_of((16, 8, 3, 3), (30, 20), (100,))
    assert len(check(np.full(layout.size, level), layout)) < 120


def test_many_tensors_of_one_entry():
    """The bounds of the words written have to hold where a tensor costs more than its levels."""
    layout = layout_of(*[(1,)] * 300)
    for step in (1, 2, 7):
        vector = np.zeros(300, np.int64)
        vector[::step] = np.arange(1, 301)[::step] * 100
        check(vector, layout)


@pytest.mark.parametrize(
    ("shape", "places"),
    [
        ((14_000_000,), [13_999_000]),
        ((30_000_000,), [0, 29_999_999]),
        ((25_000_000,), range(7, 25_000_000, 999_983)),
        ((20_000_000, 2), [1, 20_000_002, 39_999_999]),  # two rows of 20 million columns
        ((2, 20_000_000), [3, 39_999_999]),  # the reverse
        ((1, 20_000_000, 2), [39_999_998, 39_999_999]),
    ],
)
def test_few_levels_in_tens_of_millions_of_entries(shape, places):
    """Each empty cell costs a little, and all together many words."""
    layout, places = layout_of(shape), np.array(places)
    levels = np.arange(1, len(places) + 1) * 1000
    tracemalloc.start()
    indices, found = decode_integers(encode_integers(places, levels, layout), layout)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert indices.tolist() == places.tolist() and found.tolist() == levels.tolist()
    assert peak < (13 * layout.size if min(shape) == 2 < shape[0] else 1e6)


@pytest.mark.parametrize("empty", [(1, 1, 0), (2, 3, 0), (2, 3, 0, 4)])
def test_no_level_lies_in_a_kernel_of_no_entries(empty):
    """The index behind the vector, or one of the next tensor, was accepted."""
    full = tuple(max(dim, 1) for dim in empty)
    for shapes in ([(7,), empty], [(7,), empty, (9,)]):
        given = layout_of(*(full if shape is empty else shape for shape in shapes))
        body = encode_integers(np.array([7]), np.array([5]), given)
        with pytest.raises(PayloadError, match="a row with more cells than columns"):
            decode_integers(body, layout_of(*shapes))
        with pytest.raises(naive_decoder.Refused):
            naive_decoder.read_levels(body, shapes)


def test_a_matrix_and_a_convolution_of_one_grid_are_not_confused():
    """Both have 3 rows of 4 columns, but their levels lie in another order."""
    layout = layout_of((4, 3), (3, 4, 1, 1))
    levels = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
    for second in (levels, levels.reshape(4, 3).T.ravel(), np.where(levels == 5, 5, 0)):
        check(np.concatenate((levels, second)), layout)
        check(np.concatenate((np.where(levels == 5, 5, 0), second)), layout)


def test_an_equal_tensor_is_sent_as_a_copy():
    rng = np.random.default_rng(0)
    layout, single = layout_of((8, 8, 3, 3), (8, 8, 3, 3)), layout_of((8, 8, 3, 3))
    levels = rng.integers(1, 100, single.size)
    assert len(check(np.tile(levels, 2), layout)) <= len(check(levels, single)) + 2


def test_clustered_levels_cost_less_than_their_entropy_without_contexts():
    """A tenth of the rows, one sign a kernel: H(1%) + 1 + H(level) would be 9 bits and more."""
    rng = np.random.default_rng(0)
    layout = layout_of((200, 40, 3, 3))
    vector = np.zeros((200, 40, 9), np.int64)
    cells = rng.choice(20 * 40, 90, replace=False)
    vector[cells // 40 * 10, cells % 40] = rng.integers(1, 3, (90, 9))
    vector *= rng.choice([-1, 1], (200, 40, 1))
    assert 8 * len(check(vector.ravel(), layout)) < 4 * np.count_nonzero(vector)


def test_a_tensor_that_holds_something_has_a_level():
    """The code 7f ff..: a one (it holds something), and then zeros: three rows of no cells."""
    layout, body = layout_of((3, 2, 3, 3), (7,)), b"\x01\x01\x00\x02\x01\x7f\xff"
    with pytest.raises(PayloadError, match="said to hold something"):
        decode_integers(body, layout)
    with pytest.raises(naive_decoder.Refused, match="nothing in a tensor"):
        naive_decoder.read_levels(body, list(layout.shapes))


def test_buckets_take_levels_in_the_order_of_the_vector_and_not_of_the_walk():
    layout = layout_of((40, 30))  # a matrix: it is walked by columns
    vector = torch.from_numpy(np.random.default_rng(0).normal(size=1200).astype(np.float32))
    vector *= torch.arange(1, 1201)  # so that each bucket has a scale of its own
    payload, sent = encode(vector, layout, "qsgd4", picking(np.arange(1200)))
    positions, values = read_naively(payload, layout)
    decoded = decode(payload, layout)
    assert payload[5] == 2 and decoded.indices.tolist() == positions
    assert same_bits(decoded.values, values) and same_bits(sent.values, values)
    for part in (slice(0, 512), slice(512, 1024), slice(1024, 1200)):
        error = (decoded.dense() - vector)[part].abs().max()
        assert error <= 1.001 * vector[part].abs().max() / 7  # seven levels of each sign


def test_levels_that_cannot_be_sent():
    for level in (0, MAX_LEVEL + 1, -MAX_LEVEL - 1):
        with pytest.raises(ValueError, match="must lie within"):
            encode_integers(np.array([1, 2]), np.array([1, level]), layout_of((3,)))


def test_golden_bytes():
    """A change here is a change of the format, for which wire.VERSION stands."""
    layout = layout_of((4, 2, 3, 3), (4,), (4,), (3, 4), ())
    vector = np.zeros(layout.size, np.int64)
    vector[[0, 1, 4, 40, 41, 42, 71]] = [5, 4, -2, 9, 30, -8, 2]
    vector[[73, 75, 77, 79]] = [2, -3, 2, -3]
    vector[[80, 84, 91, 92]] = [7, 6, -127, 2]
    assert check(vector, layout).hex() == GOLDEN


GOLDEN = "0f027d08e8a4e9e6cef13f3737a45a1591faae03ea8af7"

# --- a stranger's bytes ---------------------------------------------------------------------------

FUZZED = layout_of((4, 3, 3, 3), (6,), (5, 4), (6,), (4, 5, 1, 1), (0, 3), (), (2, 3, 0))


@cache
def payloads() -> list[bytes]:
    bodies = []
    for seed, density in enumerate((0.03, 0.3, 1.0)):
        rng = np.random.default_rng(seed)
        vector = rng.integers(1, 20, FUZZED.size) * rng.choice([-1, 1], FUZZED.size)
        vector[rng.random(FUZZED.size) >= density] = 0
        vector[134:140] = vector[108:114]
        indices = np.flatnonzero(vector)
        bodies.append(encode_integers(indices, vector[indices], FUZZED))
    scale = np.float32(0.5).tobytes()
    return [bytes(pack(2, 3, FUZZED, scale, body)) for body in bodies]


@pytest.mark.parametrize("index", range(3))
def test_fuzz_with_a_right_checksum_agrees_with_the_naive_decoder(index):
    """Refused by both, or the same finite vector; never another exception."""
    rng = np.random.default_rng(index)
    tensors = list(zip(FUZZED.names, FUZZED.shapes, strict=True))
    for attempt in range(300):
        payload = mutate(payloads()[index], rng)
        if attempt % 3 == 0:  # rubbish behind the head
            payload = payload[:30] + rng.bytes(int(rng.integers(1, 60))) + bytes(8)
        if len(payload) < 40:
            continue
        payload = seal(payload)
        try:
            decoded = decode(payload, FUZZED)
        except PayloadError as error:
            assert "\n" not in str(error)
            with pytest.raises(naive_decoder.Refused):
                naive_decoder.decode(payload, tensors)
            continue
        positions, values = naive_decoder.decode(payload, tensors)
        assert np.isfinite(decoded.values).all() and decoded.values.tolist() == values
        if decoded.indices is not None:
            assert decoded.indices.tolist() == positions == sorted(set(positions))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body ends within a number"),
        (b"\x80", "the body ends within a number"),
        (b"\x80" * 9 + b"\x01", "more than 9 bytes"),
        (b"\x01\x01", "the body ends within a number"),
        (b"\x00\x01", "bytes are left over"),
        (b"\x01\x00\x00", "magnitudes of 0 to 0"),
        (b"\x01\x01\xff\xff\x01", "magnitudes of 1 to 32768"),
        (b"\x07", "7 levels for a vector of 6"),
        (b"\xff\xff\xff\xff\x7f\x01", "levels for a vector of 6"),
        (b"\x06\x01\x00\x05\x01", "the body ends early"),
        (b"\x06\x01\x00\x00\x01\x00", "within a word"),
        (b"\x06\x01\x00\x00\x01", "."),  # zeros only
        (b"\x81\x00\x01", "more bytes than it needs"),
        (b"\x01\x81\x80\x00\x00", "more bytes than it needs"),
        (b"\x80\x00", "more bytes than it needs"),  # none, in two bytes
        (b"\x06\x01\x01\x00\xff\xff\xff\xff\x07" + bytes(4), "begins with 2147483647, before"),
    ],
)
def test_a_wrong_body_is_named(body, message):
    with pytest.raises(PayloadError, match=message):
        decode_integers(body, layout_of((6,)))
    with pytest.raises(naive_decoder.Refused):
        naive_decoder.read_levels(body, [(6,)])


def test_every_truncation_is_refused_or_complete_in_itself():
    layout = layout_of((6, 5, 3, 3), (20,))
    vector = np.random.default_rng(0).integers(-2, 3, layout.size)
    body = check(vector, layout)
    for length in range(len(body)):
        try:
            indices, levels = decode_integers(body[:length], layout)
        except PayloadError:
            continue
        assert encode_integers(indices, levels, layout) == body[:length]


def test_hostile_bytes_take_no_more_time_and_memory_than_the_layout_allows():
    layout = layout_of((64, 64, 3, 3), (1000, 64), (200_000,), (64, 64, 3, 3))
    rng = np.random.default_rng(0)
    heads = [b"\x01\x01\x00", b"\xff\xff\x0f\x01\x00", b"\x80\x80\x10\x7f\x7f"]
    tails = [b"", bytes(3000), b"\xff" * 3000, rng.bytes(3000), rng.bytes(48)]
    number = b"\xff" * 8 + b"\x7f"
    decode_integers(encode_integers(np.array([5]), np.array([1]), layout), layout)  # compiles
    tracemalloc.start()
    for head in heads:
        for tail in tails:
            begin = time.perf_counter()
            try:
                length = varint(len(tail) // 8 * 4)  # half are the code, half the stack
                decode_integers(head + length + number + tail, layout)
            except PayloadError:
                pass
            assert time.perf_counter() - begin < 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * layout.size


@pytest.mark.parametrize("shapes", [((600, 500),), ((600, 500), (500, 600, 1, 1)), ((300_000,),)])
def test_a_full_vector_takes_no_more_memory_than_its_levels(shapes):
    """Some bytes of payload may announce as many levels as the layout has: 10 bytes an entry."""
    layout = layout_of(*shapes)
    body = encode_integers(np.arange(layout.size), np.full(layout.size, -7), layout)
    assert len(body) < 2000
    tracemalloc.start()
    indices, levels = decode_integers(body, layout)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (indices == np.arange(layout.size)).all() and (levels == -7).all()
    assert peak < 11 * layout.size


def test_it_works_where_nothing_can_be_cached(tmp_path):
    """numba raises if it finds no folder to write to; then it compiles each time anew."""
    for name in ("compiled.py", "layout.py", "wire"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    code = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import wire.walk; print(wire.walk.MAX_LEVEL)"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{MAX_LEVEL}\n", done.stderr
