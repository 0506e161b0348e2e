"""compression.py: every kind of values, dense and sparse, against a second decoder."""

import struct
import tracemalloc

import numpy as np
import pytest
import torch
from helpers import naive_decoder
from helpers.payloads import (
    SELECTING,
    WORDS,
    cases,
    picking,
    read_naively,
    same_bits,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import compression
from compression import OVERHEAD, Decoded, NotFinite, decode, encode, parse_coder
from compressors.coder import Coder, Words
from layout import Layout
from wire.container import PayloadError, pack
from wire.entropy import encode_integers

LARGEST = float(np.finfo(np.float32).max)
LAYOUT = Layout(("a", "b"), ((2, 3), ()))
VECTOR = torch.tensor([0.0, 1.5, -0.1, 0.0, 1e-3, 70000.0, -2.0])
SELECTED = np.array([1, 2, 4, 6])


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


def round_trip(vector, layout, word: str, indices=None, dense_below=0, seed=5) -> torch.Tensor:
    """encode() told the truth about what arrives, and nothing is lost; return what arrives."""
    payload, sent = encode(vector, layout, word, picking(indices), dense_below, seed)
    decoded = check(payload, layout)
    assert same_bits(decoded.values, sent.values) and np.isfinite(sent.values).all()
    if sent.indices is None:
        assert decoded.indices is None and indices is None
    else:
        np.testing.assert_array_equal(decoded.indices, sent.indices)
        if dense_below == 0:
            assert (sent.values != 0).all() or word.startswith("eden")
            assert indices is None or np.isin(sent.indices, indices).all()
    check_residual(vector, sent)
    return decoded.dense()


def check_residual(vector: torch.Tensor, sent: Decoded) -> None:
    """vector == sent + residual: exact where float32 can hold the residual, else to 1e-6."""
    arrived = sent.dense()
    representable = (vector.double() - arrived.double()).abs() <= LARGEST
    vector, arrived = vector[representable], arrived[representable]
    residual = vector - arrived
    again = residual + arrived
    # By Sterbenz's lemma v - sent is exact when sent / 2 <= v <= 2 * sent, and when sent is 0.
    ratio = vector.double() / torch.where(arrived == 0, 1, arrived.double())
    exact = (arrived == 0) | (ratio >= 0.5) & (ratio <= 2)
    assert torch.equal(again[exact], vector[exact])
    # In float64: at the largest float32, a sum rounded to float32 can be infinite.
    scale = torch.maximum(vector.abs(), arrived.abs()).double()
    again = residual.double() + arrived.double()
    assert ((again - vector.double()).abs() <= 1e-6 * scale).all()


@pytest.mark.parametrize("word", WORDS)
@settings(max_examples=40, deadline=None)
@given(case=cases(), dense_below=st.sampled_from([0, 0, 1, 4, 20, 1000]))
def test_round_trip(word, case, dense_below):
    vector, layout, chosen = case
    chosen = None if word not in SELECTING or chosen is None else chosen

    def select(vector: torch.Tensor, rest: Layout) -> np.ndarray:
        assert len(vector) == rest.size and (rest.sizes >= dense_below).all()
        return np.flatnonzero(chosen[: rest.size])

    payload, sent = encode(vector, layout, word, None if chosen is None else select, dense_below)
    assert same_bits(check(payload, layout).values, sent.values)
    check_residual(vector, sent)
    arrived = sent.dense()
    for start, size in zip(layout.offsets, layout.sizes, strict=False):
        if size < dense_below:
            part = slice(start, start + size)
            assert same_bits(arrived[part] + 0.0, vector[part] + 0.0)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.4e38, 3e38, LARGEST, 1e-45, 1e-33, 6e-8])
def test_constant_vectors(word, sparse, value):
    if sparse and word not in SELECTING:
        return
    layout = Layout(("a", "b", "c"), ((4, 5), (), (0, 3)))
    vector = torch.full((layout.size,), value)
    arrived = round_trip(vector, layout, word, np.arange(layout.size) if sparse else None)
    if word == "fp32" or word in ("ternary", "sign") and value != 0:
        assert torch.equal(arrived, vector)
    if abs(value) > 1e-38 and word in ("bf16", "int8", "int16", "qsgd8", "bounded(0.01)"):
        torch.testing.assert_close(arrived, vector, rtol=8e-3, atol=0)


@pytest.mark.parametrize("word", WORDS)
def test_extremes_side_by_side(word):
    """One vector from the smallest denormal to the largest float32, both signs."""
    powers = 2.0 ** torch.arange(-149, 128, dtype=torch.float64)
    vector = torch.cat([powers, -powers, powers * (2 - 2**-23)]).float()
    vector = vector[torch.isfinite(vector)]
    for layout in (Layout(("w",), ((len(vector),),)), by_entry(len(vector))):
        round_trip(vector, layout, word)
        if word in SELECTING:
            round_trip(vector, layout, word, np.arange(0, len(vector), 3))


def by_entry(count: int) -> Layout:
    """A tensor for each entry, so that each int8 has a scale of its own."""
    return Layout(tuple(f"t{i}" for i in range(count)), ((1,),) * count)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("layout", [Layout((), ()), Layout(("a", "b"), ((0,), (3, 0)))])
def test_nothing_to_send(word, layout):
    assert round_trip(torch.zeros(0), layout, word).shape == (0,)
    assert round_trip(torch.zeros(0), layout, word, dense_below=4).shape == (0,)
    if word in SELECTING:
        assert round_trip(torch.zeros(0), layout, word, np.zeros(0, np.int64)).shape == (0,)


@pytest.mark.parametrize("word", SELECTING)
def test_an_empty_selection_arrives_as_zeros(word):
    arrived = round_trip(VECTOR, LAYOUT, word, np.zeros(0, np.int64))
    assert torch.equal(arrived, torch.zeros(7))


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("selected", [None, np.array([0]), np.array([3]), np.zeros(0, np.int64)])
def test_not_finite_is_refused_even_where_it_is_not_selected(word, bad, selected):
    vector = torch.zeros(7)
    vector[3] = bad
    with pytest.raises(NotFinite):
        encode(vector, LAYOUT, word, picking(selected))
    vector[4] = -bad  # the sum of both is NaN
    with pytest.raises(NotFinite):
        encode(vector, LAYOUT, word, picking(selected), dense_below=3)


def test_a_sum_that_overflows_is_not_taken_for_infinity():
    vector = torch.full((7,), 3.4e38)
    assert torch.equal(decode(encode(vector, LAYOUT)[0], LAYOUT).dense(), vector)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("dense_below", [0, 2])
def test_encode_leaves_the_vector_alone_and_is_deterministic(word, dense_below):
    for indices in (None, np.array([1, 2, 4])) if word in SELECTING else (None,):
        vector = VECTOR.clone()
        payloads = {
            bytes(encode(vector, LAYOUT, word, picking(indices), dense_below)[0]) for _ in "123"
        }
        assert len(payloads) == 1 and torch.equal(vector, VECTOR)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("indices", [None, np.array([1, 2, 4])])
@pytest.mark.parametrize("dense_below", [0, 2])
def test_what_was_sent_does_not_change_when_the_vector_does(word, indices, dense_below):
    """The caller turns the vector into the residual in place."""
    if indices is not None and word not in SELECTING:
        return
    vector = VECTOR.clone()
    payload, sent = encode(vector, LAYOUT, word, picking(indices), dense_below)
    vector.zero_()
    assert same_bits(sent.values, decode(payload, LAYOUT).values)


def test_sparse_leaves_out_what_would_arrive_as_zero():
    layout = Layout(("w",), ((6,),))
    vector = torch.tensor([1.0, 0.0, 1e-3, 1e-9, -1e-45, -0.0])
    kept = {}
    for word in ("fp32", "fp16", "bf16", "int8"):
        kept[word] = encode(vector, layout, word, picking(np.arange(6)))[1].indices.tolist()
    assert kept == {"fp32": [0, 2, 3, 4], "fp16": [0, 2], "bf16": [0, 2, 3], "int8": [0]}


# --- the table of coders --------------------------------------------------------------------------


class Fp8(Coder):
    """The upper byte of a binary16: 5 bits of exponent, 2 of mantissa, rounded towards zero."""

    words = Words("fp8")
    kind = 255
    contractive = keeps_norms = True

    def write(self, values, layout, seed):
        halves = np.clip(values, -57344, 57344).astype("<f2")
        return (halves.view("<u2") >> 8).astype("u1").tobytes()

    @classmethod
    def read(cls, reader, layout, count):
        return (reader.take("u1", count).astype("<u2") << 8).view("<f2").astype(np.float32)


def test_a_coder_is_added_by_one_class_and_one_entry(monkeypatch):
    with pytest.raises(ValueError, match="'fp8' is no way to send values"):
        encode(VECTOR, LAYOUT, "fp8")
    monkeypatch.setattr(compression, "CODERS", [*compression.CODERS, Fp8])
    payload, sent = encode(VECTOR, LAYOUT, "fp8")
    assert len(payload) == OVERHEAD + LAYOUT.size
    assert sent.values.tolist() == [0, 1.5, -0.09375, 0, 0.0009765625, 57344, -2]
    assert same_bits(decode(payload, LAYOUT).values, sent.values)
    payload, sent = encode(VECTOR, LAYOUT, "fp8", picking([1, 3, 5]), dense_below=2)
    decoded = decode(payload, LAYOUT)
    assert decoded.indices.tolist() == sent.indices.tolist() == [1, 5, 6]
    assert decoded.values.tolist() == sent.values.tolist() == [1.5, 57344, -2]
    with pytest.raises(ValueError, match="valid are fp32, .*, fp8$"):
        parse_coder("fp9")


def test_a_coder_may_be_given_in_place_of_its_word():
    payload = encode(VECTOR, LAYOUT, parse_coder("int8"))[0]
    assert payload == encode(VECTOR, LAYOUT, "int8")[0]


# --- golden payloads: a change here is a change of the format, for which VERSION stands -----------

# header; body; checksum
GOLDEN = {
    "fp32": """464c555003000000 bfb0537f64c4a85d 1c00000000000000
        000000000000c03fcdccccbd000000006f12833a00b88847000000c0 3ae1261d72800c13""",
    "fp32 sparse": """464c555003030000 bfb0537f64c4a85d 1b00000000000000
        0700000004010002014b700000c03fcdccccbd6f12833a000000c0 5207947660b6d703""",
    "fp32 apart": """464c555003000002 bfb0537f64c4a85d 2000000000000000
        02000000000000c0000000000000c03fcdccccbd000000006f12833a00b88847 5534a9bd62bd7dc5""",
    "fp16": """464c555003000100 bfb0537f64c4a85d 0e00000000000000
        0000003e66ae00001914ff7b00c0 dc2380ec44541e0c""",
    "fp16 sparse": """464c555003030100 bfb0537f64c4a85d 1300000000000000
        0700000004010002014b70003e66ae191400c0 aa0a2b1123e581ac""",
    "bf16": """464c555003000200 bfb0537f64c4a85d 0e00000000000000
        0000c03fcdbd0000833a894700c0 88b9448a6d5a1a16""",
    "bf16 sparse": """464c555003030200 bfb0537f64c4a85d 1300000000000000
        0700000004010002014b70c03fcdbd833a00c0 49548ee7319e99b2""",
    "int8": """464c555003000400 bfb0537f64c4a85d 1000000000000000
        0897cb09440402813c00000000007f81 4463d7fee2a364a6""",
    "int8 sparse": """464c555003020300 bfb0537f64c4a85d 1100000000000000
        0402813c03067905cffbb3034d3992739b c684350008d7b6f6""",
    "int4 sparse apart": """464c555003020302 bfb0537f64c4a85d 1200000000000000
        02000000000000c0b66d5b3e01070001014e 76227ff22bd9ece6""",
    "qsgd4": """464c555003000500 bfb0537f64c4a85d 0900000000000000
        0400401c4600000700 20ebf41d1292b957""",
    "qsgd4 sparse": """464c555003020500 bfb0537f64c4a85d 1400000000000000
        010000002449923e030003010602c79e8f014d7b c96a6f9d5ba26f48""",
    "ternary": """464c555003000300 bfb0537f64c4a85d 0700000000000000
        02e1c25a461c5c f03e97b171a9be58""",
    "ternary sparse": """464c555003020300 bfb0537f64c4a85d 0c00000000000000
        c976663f04010003014b66ca 58e825de6fab7e99""",
    "sign": """464c555003000300 bfb0537f64c4a85d 0600000000000000
        010f421c4622 1e2df0154d826491""",
    "bounded(0.01)": """464c555003000300 bfb0537f64c4a85d 0c00000000000000
        079191ab44000000000cc000 0acb6b7ebd75e516""",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name):
    word, *selection = name.split()

    def select(vector: torch.Tensor, layout: Layout) -> np.ndarray:
        return SELECTED[SELECTED < layout.size]

    apart = 2 if "apart" in selection else 0
    select = select if "sparse" in selection else None
    payload, sent = encode(VECTOR, LAYOUT, word, select, apart, seed=1)
    assert payload.hex() == bytes.fromhex(GOLDEN[name]).hex()
    assert same_bits(check(payload, LAYOUT).values, sent.values)


# --- a stranger's bytes --------------------------------------------------------------------------


def refused(payload: bytes, message: str, layout: Layout = LAYOUT) -> None:
    with pytest.raises(PayloadError, match=message) as error:
        decode(payload, layout)
    assert "\n" not in str(error.value)
    with pytest.raises(naive_decoder.Refused):
        read_naively(payload, layout)


@pytest.mark.parametrize("length", range(0, 34))
@pytest.mark.parametrize("byte", [0, 255])
def test_short_rubbish_is_refused(length, byte):
    with pytest.raises(PayloadError):
        decode(bytes([byte]) * length, LAYOUT)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ((4, 0, 0), "byte 5: no selection has the number 4"),
        ((2, 0, 0), "byte 6: selection 2 has no values of kind 0"),
        ((2, 4, 0), "byte 6: selection 2 has no values of kind 4"),
        ((1, 3, 0), "byte 6: selection 1 has no values of kind 3"),
        ((3, 7, 0), "byte 6: selection 3 has no values of kind 7"),
        ((0, 10, 0), "byte 6: selection 0 has no values of kind 10"),
        ((0, 0, 1), "byte 7: flags 1 with selection 0 and kind 0"),
        ((2, 3, 3), "byte 7: flags 3 with selection 2 and kind 3"),
        ((0, 7, 1), "byte 7: flags 1"),
        ((0, 3, 4), "byte 7: flags 4"),
    ],
)
def test_unknown_numbers_are_named(header, message):
    selection, kind, flags = header
    refused(pack(selection, kind, LAYOUT, bytes(28), flags=flags), message)


def levels_body(*levels: int) -> bytes:
    indices = np.arange(len(levels))
    return encode_integers(indices, np.array(levels, np.int16), LAYOUT)


ONE = struct.pack("<f", 1.0)


@pytest.mark.parametrize(
    ("selection", "kind", "body", "message"),
    [
        (0, 0, bytes(27), "the body ends"),
        (0, 0, bytes(29), "1 bytes are left over"),
        (0, 3, b"", "the body ends"),
        (0, 3, b"\0" + ONE, "values of 0 bits"),
        (0, 3, b"\x11" + ONE + bytes(20), "values of 17 bits"),
        (0, 6, b"\x05" + bytes(99), "values of 5 bits"),
        (0, 3, b"\x01" + ONE + b"\x01", "padding"),
        (0, 3, b"\x01" + ONE + b"\0\0", "left over"),
        (0, 4, b"\x01" + ONE + b"\0", "the body ends"),  # two tensors, two scales
        (2, 5, struct.pack("<I", 2) + bytes(99), "2 scales are more than the layout allows"),
        (2, 5, struct.pack("<IfH", 1, 1, 2) + levels_body(1), "buckets of 2 levels in all hold 1"),
        (3, 0, struct.pack("<I", 99), "the body ends"),
        (3, 0, struct.pack("<I", 0), "the body ends within a number"),
        (0, 7, b"\0\0" + bytes(28), "a rank of 0"),
    ],
)
def test_wrong_bodies_are_named(selection, kind, body, message):
    refused(pack(selection, kind, LAYOUT, body), message)


def test_coded_positions_are_ones():
    code = levels_body(1, 2)
    body = len(code).to_bytes(4, "little") + code + bytes(8)
    refused(pack(3, 0, LAYOUT, body), "levels of up to 2 where at most 1 is due")
    code = levels_body(1, -1)
    body = len(code).to_bytes(4, "little") + code + bytes(8)
    refused(pack(3, 0, LAYOUT, body), "levels of 1, and one is another")


NAN, INFINITE, LARGE = (struct.pack("<f", x) for x in (float("nan"), float("inf"), 3.4e38))


@pytest.mark.parametrize(
    ("selection", "kind", "body"),
    [
        (0, 0, NAN + bytes(24)),
        (0, 0, INFINITE + bytes(24)),
        (0, 1, struct.pack("<e", -float("inf")) + bytes(12)),
        (0, 2, b"\x80\x7f" + bytes(12)),
        (0, 3, b"\x08" + INFINITE + bytes(7)),
        (0, 3, b"\x08" + LARGE + b"\x02" * 7),
        (0, 4, b"\x08" + ONE + NAN + b"\x01" * 7),
        (0, 5, b"\x08" + NAN + bytes(7)),
        (2, 3, LARGE + levels_body(2)),
        (2, 5, struct.pack("<IfH", 1, float("nan"), 1) + levels_body(1)),
        (0, 6, b"\x01" + bytes(8) + bytes(24) + NAN),
        (0, 7, b"\1\0" + NAN + bytes(24)),
    ],
)
def test_values_that_are_not_finite_are_refused(selection, kind, body):
    refused(pack(selection, kind, LAYOUT, body), "not finite")


MATRIX = Layout(("m",), ((4, 8),))


@pytest.mark.parametrize("bad", [NAN, INFINITE])
def test_a_scale_or_a_factor_that_is_not_finite_is_refused(bad):
    refused(pack(0, 7, MATRIX, b"\1\0" + bad + bytes(44)), "factor is not finite", MATRIX)
    eden = b"\1" + bytes(8) + bad + ONE[:0] + bytes(4)
    refused(pack(0, 6, MATRIX, eden), "scale is not finite", MATRIX)


def test_a_product_beyond_the_largest_float32_becomes_that():
    factors = b"\1\0" + struct.pack("<12f", *[3e38] * 12)
    assert set(check(pack(0, 7, MATRIX, factors), MATRIX).values.tolist()) == {LARGEST}
    eden = b"\1" + bytes(8) + LARGE + bytes(4)
    assert np.abs(check(pack(0, 6, MATRIX, eden), MATRIX).values).max() == LARGEST


def test_finite_values_whose_sum_overflows_are_accepted():
    payload = encode(torch.full((7,), 3.4e38), LAYOUT, "int8")[0]
    assert check(payload, LAYOUT).values.max() == np.float32(3.4e38)


def test_decoding_takes_memory_in_proportion_to_the_layout():
    layout = Layout(("w",), ((200_000,),))
    payload = encode(torch.ones(layout.size), layout, "int8", picking(np.arange(layout.size)))[0]
    decode(payload, layout)  # compiles
    tracemalloc.start()
    decode(payload, layout)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * layout.size


# --- what was agreed on ---------------------------------------------------------------------------

TENSORS = Layout(("m", "bias", "v"), ((30, 40), (7,), (900,)))
DENSE_VECTOR = torch.from_numpy(np.random.default_rng(0).standard_normal(TENSORS.size, np.float32))


def sent_with(word: str, indices=None, dense_below: int = 0) -> memoryview:
    return encode(DENSE_VECTOR, TENSORS, word, picking(indices), dense_below)[0]


@pytest.mark.parametrize("word", [*WORDS, "bounded(3.125e-05)", "bounded(0.5)"])
@pytest.mark.parametrize("dense_below", [0, 10])
@pytest.mark.parametrize("scale", [1.0, 2.0**-147])
def test_what_was_agreed_on_is_decoded(word, dense_below, scale):
    """Denormal numbers reach levels that others do not."""
    vector = DENSE_VECTOR * scale
    for indices in (None, np.arange(0, 1200, 3)) if parse_coder(word).takes_selection else (None,):
        payload, sent = encode(vector, TENSORS, word, picking(indices), dense_below)
        for values in (word, parse_coder(word)):
            most = None if indices is None else len(indices)
            decoded = decode(payload, TENSORS, values, most, dense_below)
            assert same_bits(decoded.values, sent.values)


FEW = np.arange(100)


@pytest.mark.parametrize(
    ("sent", "agreed", "message"),
    [
        (("int8",), ("fp32",), "byte 5: selection 0, kind 4: not fp32 as agreed"),
        (("int8",), ("int4",), "values of 8 bits, and int4 was agreed on"),
        (("eden4",), ("eden2",), "values of 4 bits, and eden2 was agreed on"),
        (("sign",), ("ternary",), "values of 1 bits, and ternary was agreed on"),
        (("bounded(0.01)",), ("bounded(0.3)",), "values of 7 bits, and bounded"),
        (("powersgd(2)",), ("powersgd(1)",), "a rank of 2, and powersgd.1. was agreed on"),
        (("fp32", FEW), ("fp32",), "selection 3, kind 0: not fp32 as agreed"),
        (("fp32",), ("fp32", 100), "selection 0, kind 0: not fp32 as agreed"),
        (("fp16", FEW), ("fp16", 99), "100 positions where at most 99 are due"),
        (("fp16", np.arange(1200)), ("fp16", 99), "1200 positions where at most 99 are due"),
        (("int8", FEW), ("int8", 9), "positions where at most 9 are due"),
        (("qsgd8", FEW), ("qsgd8", 9), "positions where at most 9 are due"),
        (("int8", FEW), ("int4", 100), "levels of up to 127 where at most 7 is due"),
        (("qsgd4", FEW), ("qsgd2", 100), "levels of up to 7 where at most 1 is due"),
        (("means4",), ("means2",), "values of 4 bits, and means2 was agreed on"),
        (("means4", FEW), ("means2", 100), "values of 4 bits, and means2 was agreed on"),
        (("means4", FEW), ("means4", 9), "positions where at most 9 are due"),
        (("means2", FEW), ("ternary", 100), "selection 2, kind 8: not ternary as agreed"),
        (("bounded(0.01)", FEW), ("ternary", 100), "levels of up to 51 where at most 1 is due"),
        (("int8", None, 10), ("int8",), "tensors of under 10 entries are apart, not 0 as agreed"),
        (("int8",), ("int8", None, 10), "tensors of under 0 entries are apart, not 10 as agreed"),
        (("int8", FEW, 10), ("int8", 100, 9), "under 10 entries are apart, not 9 as agreed"),
    ],
)
def test_what_was_not_agreed_on_is_refused(sent, agreed, message):
    payload = sent_with(*sent)
    decode(payload, TENSORS)  # well-formed
    with pytest.raises(PayloadError, match=message):
        decode(payload, TENSORS, *agreed)


def test_a_limit_under_which_there_is_no_tensor_leaves_none_apart():
    payload = sent_with("int8", None, 7)
    assert payload[7] < 2
    decode(payload, TENSORS, "int8", None, 7)


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


# --- on another device ----------------------------------------------------------------------------


@pytest.mark.parametrize("selected", [True, False])
def test_what_has_arrived_on_another_device_adds_up_as_on_the_cpu(selected):
    """There its parts are tensors, as they may be on a CPU too."""
    indices = np.array([1, 4, 5]) if selected else None
    values = np.array([0.5, -2.0, 3.0] if selected else np.arange(7.0), np.float32)
    arrays = Decoded(7, indices, values)
    there = None if indices is None else torch.from_numpy(indices)
    tensors = Decoded(7, there, torch.from_numpy(values))
    one, other = torch.linspace(0, 1, 7), torch.linspace(0, 1, 7)
    arrays.add_to(one, 0.3)
    tensors.add_to(other, 0.3)
    torch.testing.assert_close(other, one, rtol=1e-6, atol=0)
    assert torch.equal(tensors.dense(), arrays.dense())
    assert arrays.to(torch.device("cpu")) is arrays


def test_positions_may_be_selected_as_a_tensor_or_as_an_array():
    vector = torch.arange(len(VECTOR), dtype=torch.float32)
    payloads = [
        bytes(encode(vector, LAYOUT, "int8", lambda *_, c=chosen: c)[0])
        for chosen in (np.array([1, 3]), torch.tensor([1, 3]))
    ]
    assert payloads[0] == payloads[1]


def test_only_what_is_not_there_goes_to_a_device():
    """On a GPU, fp32 is there already, and the positions of a mask are not."""
    meta, values = torch.device("meta"), torch.ones(2, device="meta")
    moved = Decoded(5, np.array([1, 3]), values).to(meta)
    assert moved.values is values and moved.indices.device == meta
    moved.add_to(torch.zeros(5, device=meta))
    assert Decoded(2, None, values).to(meta).indices is None
    both = Decoded(2, np.array([0]), np.ones(1, np.float32)).to(meta)
    assert both.indices.device == both.values.device == meta
