"""compression.py: every kind of values, dense and sparse, against a second decoder."""

import struct
import tracemalloc
from functools import cache

import naive_decoder
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_wire import changed, seal

from compression import VALUES, Decoded, NotFinite, decode, encode
from entropy import encode_integers
from wire import Layout, PayloadError, pack

KINDS = list(VALUES)
LARGEST = float(np.finfo(np.float32).max)
LAYOUT = Layout(("a", "b"), ((2, 3), ()))
VECTOR = torch.tensor([0.0, 1.5, -0.1, 0.0, 1e-3, 70000.0, -2.0])
SELECTED = np.array([1, 2, 4, 6])


def same_bits(ours, theirs) -> bool:
    a, b = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    return a.shape == b.shape and (a.view(np.uint32) == b.view(np.uint32)).all()


def read_naively(payload: bytes, layout: Layout):
    return naive_decoder.decode(payload, list(zip(layout.names, layout.shapes, strict=True)))


def check(payload: bytes, layout: Layout) -> Decoded:
    """Decode with both decoders; they must agree bit for bit."""
    decoded = decode(payload, layout)
    positions, values = read_naively(payload, layout)
    if positions is None:
        assert decoded.indices is None and len(decoded.values) == layout.size
    else:
        assert decoded.indices.tolist() == positions
    assert decoded.size == layout.size and decoded.values.dtype == np.float32
    assert same_bits(decoded.values, values)
    return decoded


def round_trip(vector: torch.Tensor, layout: Layout, kind: str, indices=None) -> torch.Tensor:
    """encode() told the truth about what arrives, and nothing is lost; return what arrives."""
    payload, sent = encode(vector, layout, kind, indices)
    decoded = check(payload, layout)
    assert same_bits(decoded.values, sent.values)
    if indices is None:
        assert sent.indices is None
    else:
        np.testing.assert_array_equal(decoded.indices, sent.indices)
        assert (sent.values != 0).all() and np.isin(sent.indices, indices).all()

    residual = vector.clone()
    sent.add_to(residual, -1.0)
    again = residual.clone()
    sent.add_to(again)
    # By Sterbenz's lemma v - sent is exact when sent / 2 <= v <= 2 * sent, and it is exact when
    # sent is 0. Rounding stays inside of that; fp16's clamp to 65504 leaves it beyond 2 * 65504.
    exact = torch.full((len(vector),), True) if kind != "fp16" else vector.abs() <= 2 * 65504
    assert torch.equal(again[exact], vector[exact])
    torch.testing.assert_close(again, vector, rtol=1e-6, atol=0)
    return decoded.dense()


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
moderate = st.floats(-8, 8, width=32)
ties = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 127.0, 254.0, 3.0])


@st.composite
def cases(draw):
    """A layout with scalars and empty tensors, a vector of one character, a selection."""
    dims = st.lists(st.integers(0, 5), max_size=3)
    shapes = tuple(map(tuple, draw(st.lists(dims, min_size=1, max_size=4))))
    layout = Layout(tuple(f"t{i}" for i in range(len(shapes))), shapes)
    elements = draw(st.sampled_from([finite, moderate, ties]))
    vector = draw(arrays(np.float32, layout.size, elements=elements))
    chosen = draw(st.none() | arrays(np.bool_, layout.size))
    return torch.from_numpy(vector), layout, chosen


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_round_trip(kind, case):
    vector, layout, chosen = case
    round_trip(vector, layout, kind, None if chosen is None else np.flatnonzero(chosen))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.4e38, LARGEST, 1e-45, 1e-33, 6e-8])
def test_constant_vectors(kind, sparse, value):
    layout = Layout(("a", "b", "c"), ((4, 5), (), (0, 3)))
    vector = torch.full((layout.size,), value)
    arrived = round_trip(vector, layout, kind, np.arange(layout.size) if sparse else None)
    if abs(value) == 1 or kind == "fp32":
        assert torch.equal(arrived, vector) or kind == "int8"
    if abs(value) > 1e-38 and kind in ("bf16", "int8"):
        torch.testing.assert_close(arrived, vector, rtol=4e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_extremes_side_by_side(kind):
    """One vector from the smallest denormal to the largest float32, both signs."""
    powers = 2.0 ** torch.arange(-149, 128, dtype=torch.float64)
    vector = torch.cat([powers, -powers, powers * (2 - 2**-23)]).float()
    vector = vector[torch.isfinite(vector)]
    for shape in ((len(vector),), (1,)):
        layout = Layout(("w",), (shape,)) if shape != (1,) else by_entry(len(vector))
        round_trip(vector, layout, kind)
        round_trip(vector, layout, kind, np.arange(0, len(vector), 3))


def by_entry(count: int) -> Layout:
    """A tensor for each entry, so that each int8 has a scale of its own."""
    return Layout(tuple(f"t{i}" for i in range(count)), ((1,),) * count)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [Layout((), ()), Layout(("a", "b"), ((0,), (3, 0)))])
def test_nothing_to_send(kind, layout):
    assert round_trip(torch.zeros(0), layout, kind).shape == (0,)
    assert round_trip(torch.zeros(0), layout, kind, np.zeros(0, np.int64)).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_selection_arrives_as_zeros(kind):
    arrived = round_trip(VECTOR, LAYOUT, kind, np.zeros(0, np.int64))
    assert torch.equal(arrived, torch.zeros(7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("selected", [None, np.array([0]), np.array([3]), np.zeros(0, np.int64)])
def test_not_finite_is_refused_even_where_it_is_not_selected(kind, bad, selected):
    vector = torch.zeros(7)
    vector[3] = bad
    with pytest.raises(NotFinite):
        encode(vector, LAYOUT, kind, selected)
    vector[4] = -bad  # the sum of both is NaN
    with pytest.raises(NotFinite):
        encode(vector, LAYOUT, kind, selected)


def test_a_sum_that_overflows_is_not_taken_for_infinity():
    vector = torch.full((7,), 3.4e38)
    assert torch.equal(decode(encode(vector, LAYOUT)[0], LAYOUT).dense(), vector)


def test_encode_leaves_the_vector_alone_and_is_deterministic():
    for kind in KINDS:
        for indices in (None, SELECTED):
            vector = VECTOR.clone()
            payloads = {encode(vector, LAYOUT, kind, indices)[0] for _ in range(3)}
            assert len(payloads) == 1 and torch.equal(vector, VECTOR)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("indices", [None, SELECTED])
def test_what_was_sent_does_not_change_when_the_vector_does(kind, indices):
    """The caller turns the vector into the residual in place."""
    vector = VECTOR.clone()
    payload, sent = encode(vector, LAYOUT, kind, indices)
    vector.zero_()
    assert same_bits(sent.values, decode(payload, LAYOUT).values)


# --- what each kind does to a number, from the definition of the format --------------------------


def round_fp16(value: float) -> float:
    clamped = min(max(value, -65504.0), 65504.0)
    return struct.unpack("<e", struct.pack("<e", clamped))[0]


def round_bf16(value: float) -> float:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    sign, bits = bits & 0x80000000, bits & 0x7FFFFFFF
    rounded = min((bits + 0x7FFF + (bits >> 16 & 1)) >> 16, 0x7F7F)
    return struct.unpack("<f", struct.pack("<I", sign | rounded << 16))[0]


@pytest.mark.parametrize(("kind", "reference"), [("fp16", round_fp16), ("bf16", round_bf16)])
@settings(max_examples=60, deadline=None)
@given(values=st.lists(finite | moderate | st.floats(60000, 70000, width=32), max_size=40))
def test_halves_round_to_nearest_even_and_clamp(kind, reference, values):
    layout = Layout(("w",), ((len(values),),))
    _, sent = encode(torch.tensor(values), layout, kind)
    assert same_bits(sent.values, [reference(value) for value in values])


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_int8_is_the_nearest_of_255_levels_per_tensor(case):
    vector, layout, _ = case
    sent = encode(vector, layout, "int8")[1].values.astype(np.float64)
    for start, stop in zip(layout.offsets[:-1], layout.offsets[1:], strict=True):
        values = vector[start:stop].double().numpy()
        largest = np.abs(values).max(initial=0.0)
        # half a step, a rounding error, and the coarseness of a denormal scale
        allowed = largest / 254 * (1 + 1e-5) + 127 * 2.0**-149
        assert (np.abs(sent[start:stop] - values) <= allowed).all()
        assert np.abs(sent[start:stop]).max(initial=0.0) <= largest


def test_int8_by_hand():
    layout = Layout(("a", "b"), ((4,), (3,)))
    vector = torch.tensor([127.0, 2.5, 3.5, -0.4, 3.0, -254.0, 0.3])
    payload, sent = encode(vector, layout, "int8")
    assert sent.values.tolist() == [127, 2, 4, 0, 4, -254, 0]  # a half goes to the even level
    assert payload[24:39] == struct.pack("<ff7b", 1.0, 2.0, 127, 2, 4, 0, 2, -127, 0)


def test_int8_scale_is_rounded_down_so_that_nothing_arrives_larger_than_it_was():
    below_a_tenth = np.nextafter(np.float32(0.1), np.float32(0))
    vector = torch.tensor([12.7])  # the float32 nearest to 12.7 / 127 is 0.1, and 127 * 0.1 > 12.7
    payload, sent = encode(vector, Layout(("w",), ((1,),)), "int8")
    assert payload[24:28] == below_a_tenth.tobytes()
    assert sent.values[0] == np.float32(127) * below_a_tenth < np.float32(12.7)


def test_sparse_leaves_out_what_would_arrive_as_zero():
    layout = Layout(("w",), ((6,),))
    vector = torch.tensor([1.0, 0.0, 1e-3, 1e-9, -1e-45, -0.0])
    kept = {}
    for kind in KINDS:
        kept[kind] = encode(vector, layout, kind, np.arange(6))[1].indices.tolist()
    assert kept == {"fp32": [0, 2, 3, 4], "fp16": [0, 2], "bf16": [0, 2, 3], "int8": [0]}


# --- golden payloads: a change here is a change of the format, for which VERSION stands -----------

# header; body, of a sparse payload positions first, of a coded one the scale; checksum
GOLDEN = {
    "fp32 dense": """464c555001000000 bfb0537f64c4a85d 1c00000000000000
        00000000 0000c03f cdccccbd 00000000 6f12833a 00b88847 000000c0  e1678ba2e8c05611""",
    "fp32 sparse": """464c555001010000 bfb0537f64c4a85d 1d00000000000000
        03000000 01000000 01000000 6c  0000c03f cdccccbd 6f12833a 000000c0  c4c511acd4fa0c3e""",
    "fp16 dense": """464c555001000100 bfb0537f64c4a85d 0e00000000000000
        0000 003e 66ae 0000 1914 ff7b 00c0  5b66e902e793b295""",
    "fp16 sparse": """464c555001010100 bfb0537f64c4a85d 1500000000000000
        03000000 01000000 01000000 6c  003e 66ae 1914 00c0  041aec5e64bcaf00""",
    "bf16 dense": """464c555001000200 bfb0537f64c4a85d 0e00000000000000
        0000 c03f cdbd 0000 833a 8947 00c0  5559c410da2a6d73""",
    "bf16 sparse": """464c555001010200 bfb0537f64c4a85d 1500000000000000
        03000000 01000000 01000000 6c  c03f cdbd 833a 00c0  cbf3d9731122a28c""",
    "int8 dense": """464c555001000300 bfb0537f64c4a85d 0f00000000000000
        97cb0944 0402813c  00 00 00 00 00 7f 81  27653d433df14bec""",
    "int8 sparse": """464c555001020300 bfb0537f64c4a85d 0c00000000000000
        0402813c  03 06  4d3780b8abde  002b530be56627e4""",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name):
    kind, selection = name.split()
    payload, sent = encode(VECTOR, LAYOUT, kind, SELECTED if selection == "sparse" else None)
    assert payload.hex() == bytes.fromhex(GOLDEN[name]).hex()
    assert same_bits(check(payload, LAYOUT).values, sent.values)


# --- a stranger's bytes --------------------------------------------------------------------------

FUZZED = Layout(("conv", "scalar", "empty", "bias"), ((6, 10), (), (0, 4), (19,)))


@cache
def payloads() -> list[bytes]:
    rng = np.random.default_rng(0)
    vector = torch.from_numpy(rng.standard_normal(FUZZED.size).astype(np.float32))
    few, many = np.array([0, 5, 59, 60, 79]), np.flatnonzero(rng.random(FUZZED.size) < 0.6)
    selections = (None, few, many, np.zeros(0, np.int64))
    return [encode(vector, FUZZED, kind, chosen)[0] for kind in KINDS for chosen in selections]


def mutate(payload: bytes, rng: np.random.Generator) -> bytes:
    """One to three small wounds, mostly behind the header and often in the counts."""
    wounded = bytearray(payload)
    for _ in range(rng.integers(1, 4)):
        last = max(len(wounded) - 8, 25)
        place = int(rng.integers(24, min(last, 46)) if rng.random() < 0.5 else rng.integers(last))
        byte = int(rng.choice([0, 1, 2, 0x7F, 0x80, 0xFF, rng.integers(256)]))
        wound = rng.integers(6)
        if wound == 0:
            wounded[place] = byte
        elif wound == 1:
            wounded[place] ^= 1 << int(rng.integers(8))
        elif wound == 2:
            del wounded[place : place + int(rng.integers(1, 5))]
        elif wound == 3:
            wounded[place:place] = bytes([byte]) * int(rng.integers(1, 40))
        elif wound == 4:
            wounded[place : place + 4] = int(rng.integers(2**32)).to_bytes(4, "little")
        else:  # swap two bytes
            other = int(rng.integers(last))
            wounded[place], wounded[other] = wounded[other], wounded[place]
    return bytes(wounded)


def outcome(payload: bytes):
    """What decode() makes of it: refused, or a finite vector of the right size."""
    try:
        decoded = decode(payload, FUZZED)
    except PayloadError as error:
        assert "\n" not in str(error)
        return None
    vector = decoded.dense()
    assert vector.shape == (FUZZED.size,) and torch.isfinite(vector).all()
    positions = range(FUZZED.size) if decoded.indices is None else decoded.indices.tolist()
    assert list(positions) == sorted(set(positions)) and len(positions) == len(decoded.values)
    return list(positions), decoded.values


@pytest.mark.parametrize("index", range(16))
def test_fuzz_without_a_right_checksum_is_always_refused(index):
    rng = np.random.default_rng(index)
    for _ in range(60):
        payload = mutate(payloads()[index], rng)
        if payload != payloads()[index]:
            assert outcome(payload) is None


@pytest.mark.parametrize("index", range(16))
def test_fuzz_with_a_right_checksum_and_length_agrees_with_the_naive_decoder(index):
    rng = np.random.default_rng(index)
    num_accepted = 0
    for _ in range(250):
        payload = mutate(payloads()[index], rng)
        if len(payload) >= 32:
            payload = seal(payload)
        ours = outcome(payload)
        try:
            positions, values = read_naively(payload, FUZZED)
        except naive_decoder.Refused:
            assert ours is None
            continue
        num_accepted += 1
        assert ours is not None and same_bits(ours[1], values)
        assert ours[0] == (list(range(FUZZED.size)) if positions is None else positions)
    assert num_accepted > 0 or len(payloads()[index]) < 60


@pytest.mark.parametrize("length", range(0, 34))
@pytest.mark.parametrize("byte", [0, 255])
def test_short_rubbish_is_refused(length, byte):
    assert outcome(bytes([byte]) * length) is None


@pytest.mark.parametrize(
    ("position", "byte", "message"),
    [
        (5, 3, "byte 5: no selection has the number 3"),
        (5, 2, "byte 6: selection 2 has no values of kind 0"),
        (6, 4, "byte 6: no kind of values .* 4"),
    ],
)
def test_unknown_numbers_are_named(position, byte, message):
    with pytest.raises(PayloadError, match=message):
        decode(seal(changed(payloads()[0], position, byte)), FUZZED)


def test_selected_int8_is_coded_and_other_kinds_are_not():
    for kind in KINDS:
        payload = encode(VECTOR, LAYOUT, kind, SELECTED)[0]
        assert payload[5] == (2 if kind == "int8" else 1)
        with pytest.raises(PayloadError, match="byte 6: selection . has no values of kind"):
            decode(seal(changed(payload, 5, 3 - payload[5])), LAYOUT)


@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_selected_int8_is_the_nearest_of_255_levels_of_the_selection(case):
    vector, layout, _ = case
    sent = encode(vector, layout, "int8", np.arange(layout.size))[1].dense().double().numpy()
    values = vector.double().numpy()
    largest = np.abs(values).max(initial=0.0)
    allowed = largest / 254 * (1 + 1e-5) + 127 * 2.0**-149
    assert (np.abs(sent - values) <= allowed).all()
    assert np.abs(sent).max(initial=0.0) <= largest


def test_a_level_beyond_127_is_refused():
    levels = encode_integers(np.array([0, 5]), np.array([128, 1]), LAYOUT)
    with pytest.raises(PayloadError, match="a level lies beyond 127"):
        decode(pack(2, 3, LAYOUT, struct.pack("<f", 1.0), levels), LAYOUT)


@pytest.mark.parametrize("index", range(16))
@pytest.mark.parametrize("change", ["longer", "shorter"])
def test_a_body_of_another_length_is_refused(index, change):
    payload = payloads()[index]
    wounded = payload[:-8] + b"\0" * 9 if change == "longer" else payload[:-9] + b"\0" * 8
    if change == "shorter" and payload[5] == 2:  # zeros follow a code, so another may be complete
        outcome(seal(wounded))
        return
    with pytest.raises(PayloadError, match="left over|the body ends"):
        decode(seal(wounded), FUZZED)


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        ("fp32", struct.pack("<f", float("nan"))),
        ("fp32", struct.pack("<f", float("inf"))),
        ("fp16", struct.pack("<e", -float("inf"))),
        ("bf16", b"\x80\x7f"),
        ("int8", struct.pack("<f", float("inf"))),
        ("int8", struct.pack("<f", float("nan"))),
        ("int8", struct.pack("<f", 3.4e38)),  # times a level
    ],
)
def test_values_that_are_not_finite_are_refused(kind, bits):
    selections = [None, np.arange(7)] if kind == "int8" else [None]  # else positions come first
    for indices in selections:
        payload = encode(torch.ones(7), LAYOUT, kind, indices)[0]
        wounded = payload[:24] + bits + payload[24 + len(bits) :]
        with pytest.raises(PayloadError, match="not finite"):
            decode(seal(wounded), LAYOUT)


def test_finite_values_whose_sum_overflows_are_accepted():
    payload = encode(torch.full((7,), 3.4e38), LAYOUT, "int8")[0]
    assert check(payload, LAYOUT).values.max() == np.float32(3.4e38)


def test_decoding_takes_memory_in_proportion_to_the_layout():
    layout = Layout(("w",), ((200_000,),))
    payload = encode(torch.ones(layout.size), layout, "int8", np.arange(layout.size))[0]
    decode(payload, layout)  # compiles
    tracemalloc.start()
    decode(payload, layout)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * layout.size


# --- Decoded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", [None, np.array([1, 3])])
def test_add_to_adds_in_place_with_a_weight(indices):
    values = np.array([1.0, -2.0] if indices is not None else [0.0, 1.0, 0.0, -2.0], np.float32)
    decoded = Decoded(4, indices, values)
    vector = torch.tensor([1.0, 1.0, 1.0, 1.0])
    decoded.add_to(vector, 0.5)
    assert vector.tolist() == [1.0, 1.5, 1.0, 0.0]
    decoded.add_to(vector)
    assert vector.tolist() == [1.0, 2.5, 1.0, -2.0]
    assert decoded.dense().tolist() == [0.0, 1.0, 0.0, -2.0]
    assert values.tolist() == decoded.values.tolist()
