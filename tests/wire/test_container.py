"""The container and the positions, against docs/wire-format.md and a second decoder."""

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
import zstandard
from helpers import naive_decoder
from helpers.payloads import seal
from hypothesis import given, settings
from hypothesis import strategies as st

from compression import decode, encode
from layout import Layout
from wire import container as wire
from wire.container import PayloadError, PayloadMemory, Reader, compress, decompress, pack, unpack
from wire.positions import decode_positions, encode_positions

pytestmark = pytest.mark.filterwarnings("error")
PAGE = Path(__file__).parents[2] / "docs" / "wire-format.md"
LAYOUT = Layout(("conv.weight", "scale", "bias"), ((4, 2, 3), (), (3,)))
PAYLOAD = bytes(pack(1, 3, LAYOUT, b"abc", b"de", flags=2))


def changed(payload: bytes, position: int, byte: int) -> bytes:
    return payload[:position] + bytes([byte]) + payload[position + 1 :]


# --- the page -----------------------------------------------------------------------------------


SELECTED = np.array([0, 2, 3, 17, 26])


def example(number: int) -> bytes:
    """The payload of a worked example of the page."""
    blocks = re.findall(r"```hex\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return bytes.fromhex(re.sub(r"#.*", "", blocks[number]))


@pytest.mark.parametrize(
    ("number", "arriving"),
    [
        (0, {0: 0.00100040435791015625, 2: 0.25, 3: -1, 17: 0.5, 26: 3}),
        (1, {2: 0.25984251, 3: -0.99212599, 17: 0.49606299, 26: 3}),
    ],
)
def test_both_decoders_read_the_worked_examples_of_the_page(number, arriving):
    tensors = list(zip(LAYOUT.names, LAYOUT.shapes, strict=True))
    positions, values = naive_decoder.decode(example(number), tensors)
    assert positions == list(arriving)
    assert values == pytest.approx(list(arriving.values()), rel=1e-7)
    decoded = decode(example(number), LAYOUT)
    assert decoded.indices.tolist() == positions and decoded.values.tolist() == values


def test_the_worked_examples_of_the_page_are_what_the_code_writes():
    vector = torch.zeros(28)
    vector[SELECTED] = torch.tensor([0.001, 0.25, -1.0, 0.5, 3.0])
    halves = vector[SELECTED].numpy().astype("<f2").tobytes()
    sparse = pack(1, 1, LAYOUT, encode_positions(SELECTED, LAYOUT), halves)
    assert sparse.hex(" ") == example(0).hex(" ")
    payload, _ = encode(vector, LAYOUT, "int8", lambda vector, layout: SELECTED)
    assert payload.hex(" ") == example(1).hex(" ")
    shorter, _ = encode(vector, LAYOUT, "fp16", lambda vector, layout: SELECTED)
    assert shorter[5] == 3 and len(shorter) == len(sparse) - 4  # as the page says


def test_the_checksum_of_nothing_is_the_one_that_the_page_and_xxhash_publish():
    assert xxhash.xxh3_64_hexdigest(b"") == "2d06800538d394c2"
    assert "`2d06800538d394c2`" in PAGE.read_text()


# --- layout -------------------------------------------------------------------------------------


def test_a_layout_knows_sizes_and_offsets_with_scalars_and_empty_tensors():
    layout = Layout(("a", "b", "c", "d"), ((2, 3), (), (0, 5), (4,)))
    assert layout.sizes.tolist() == [6, 1, 0, 4]
    assert layout.offsets.tolist() == [0, 6, 7, 7, 11]
    assert layout.size == 11
    assert Layout((), ()).size == 0 and Layout((), ()).offsets.tolist() == [0]


def test_fingerprint_is_that_of_the_page():
    assert LAYOUT.fingerprint.to_bytes(8, "little").hex(" ") == "68 43 69 61 76 46 5b 22"


@pytest.mark.parametrize(
    "other",
    [
        Layout(("conv.weight", "scale", "bias"), ((4, 3, 2), (), (3,))),  # another shape
        Layout(("conv.weight", "scale", "bias"), ((4, 2, 3), (1,), (3,))),
        Layout(("conv.weight", "shift", "bias"), ((4, 2, 3), (), (3,))),  # another name
        Layout(("scale", "conv.weight", "bias"), ((), (4, 2, 3), (3,))),  # another order
        Layout(("conv.weight", "scale"), ((4, 2, 3), ())),
    ],
)
def test_another_layout_has_another_fingerprint_and_is_refused(other):
    assert other.fingerprint != LAYOUT.fingerprint
    with pytest.raises(PayloadError, match="another layout"):
        unpack(PAYLOAD, other)


def test_names_with_separators_do_not_collide():
    names = ["a", "a:2;b", "a:2;b:", "a\\", "a\\;b", ";", ":", "\\:", "a:", "", "é"]
    layouts = [Layout((name,), ((2,),)) for name in names]
    layouts += [Layout(("a", "b"), ((2,), (2,))), Layout(("a;", "b"), ((2,), (2,)))]
    layouts += [Layout(("a", ";b"), ((2,), (2,))), Layout((), ())]
    assert len({layout.fingerprint for layout in layouts}) == len(layouts)
    for layout in layouts:
        tensors = list(zip(layout.names, layout.shapes, strict=True))
        digest = naive_decoder.fingerprint(tensors)
        assert layout.fingerprint == int.from_bytes(digest, "little")


def test_the_layout_of_a_mask():
    mask = np.array([1, 5, 23, 24, 27])
    masked = LAYOUT.on(mask)
    assert masked.names == LAYOUT.names and masked.shapes == ((3,), (1,), (1,))
    whole = naive_decoder.fingerprint(list(zip(LAYOUT.names, LAYOUT.shapes, strict=True)))
    agreed = naive_decoder.agreed_on_a_mask(whole, mask.tolist())
    tensors = list(zip(masked.names, masked.shapes, strict=True))
    digest = naive_decoder.fingerprint(tensors, agreed)
    assert masked.fingerprint == int.from_bytes(digest, "little")
    assert LAYOUT.on(mask) == masked and LAYOUT.on(mask.astype(np.int32)) == masked
    assert LAYOUT.on(np.zeros(0, np.int64)).shapes == ((0,), (0,), (0,))


@pytest.mark.parametrize("other", [[1, 5, 23, 24, 26], [1, 5, 22, 24, 27], [1, 5, 23, 24]])
def test_ends_that_disagree_about_a_mask_find_out(other):
    masked = LAYOUT.on(np.array([1, 5, 23, 24, 27]))
    vector = torch.arange(1.0, 6.0)
    payload, _ = encode(vector, masked, "fp16")
    assert torch.equal(decode(payload, masked).dense(), vector)
    parent = Layout(LAYOUT.names, ((4, 3, 2), (), (3,))).on(np.array([1, 5, 23, 24, 27]))
    for wrong in (LAYOUT.on(np.array(other)), parent, Layout(masked.names, masked.shapes)):
        with pytest.raises(PayloadError, match="another layout"):
            decode(payload, wrong)


def test_the_layout_of_some_tensors():
    chosen = LAYOUT.where(np.array([True, False, True]))
    assert (chosen.names, chosen.shapes) == (("conv.weight", "bias"), ((4, 2, 3), (3,)))
    assert LAYOUT.where(np.zeros(3, bool)).size == 0


# --- container ----------------------------------------------------------------------------------


def test_container_bytes():
    assert PAYLOAD[:8] == b"FLUP\x03\x01\x03\x02"
    assert PAYLOAD[8:16] == LAYOUT.fingerprint.to_bytes(8, "little")
    assert PAYLOAD[16:24] == b"\x05" + bytes(7)
    assert PAYLOAD[24:29] == b"abcde"
    assert PAYLOAD[29:] == xxhash.xxh3_64_intdigest(PAYLOAD[:29]).to_bytes(8, "little")
    selection, kind, flags, body = unpack(PAYLOAD, LAYOUT)
    assert (selection, kind, flags, bytes(body)) == (1, 3, 2, b"abcde")


def test_an_empty_body_is_the_shortest_payload():
    payload = pack(0, 0, LAYOUT)
    assert len(payload) == 32 and bytes(unpack(payload, LAYOUT)[3]) == b""


@pytest.mark.parametrize("length", range(len(PAYLOAD)))
def test_every_truncation_is_refused(length):
    with pytest.raises(PayloadError):
        unpack(PAYLOAD[:length], LAYOUT)


def test_every_flipped_bit_is_refused():
    for bit in range(8 * len(PAYLOAD)):
        flipped = bytearray(PAYLOAD)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PayloadError):
            unpack(bytes(flipped), LAYOUT)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "0 bytes are too short"),
        (PAYLOAD[:31], "31 bytes are too short"),
        (seal(changed(PAYLOAD, 0, 0x47)), "byte 0: magic is b'GLUP'"),
        (seal(changed(PAYLOAD, 4, 2)), "byte 4: version 2 is not 3"),
        (seal(changed(PAYLOAD, 4, 4)), "byte 4: version 4 is not 3"),
        (PAYLOAD + b"x", "byte 16: a body of 5 bytes in a payload of 38"),
        (PAYLOAD[:-1], "byte 16: a body of 5 bytes in a payload of 36"),
        (changed(PAYLOAD, 26, 0), "checksum"),
        (changed(PAYLOAD, len(PAYLOAD) - 1, PAYLOAD[-1] ^ 1), "checksum"),
        (seal(changed(PAYLOAD, 8, PAYLOAD[8] ^ 1)), "byte 8: made for another layout"),
    ],
)
def test_a_wrong_container_is_named(payload, message):
    with pytest.raises(PayloadError, match=re.escape(message)) as error:
        unpack(payload, LAYOUT)
    assert "\n" not in str(error.value)


def test_reader_stops_at_the_end_and_wants_to_reach_it():
    reader = Reader(memoryview(b"\x01\x02\x00\xff"))
    assert reader.take("u1", 1).tolist() == [1]
    assert reader.take("<u2", 1).tolist() == [2]
    with pytest.raises(PayloadError, match="1 bytes are left over"):
        reader.finish()
    with pytest.raises(PayloadError, match="ends at byte 4, 2 more"):
        reader.take("<u2", 1)
    assert reader.take("i1", 1).tolist() == [-1]
    reader.finish()
    assert len(reader.take("<f4", 0)) == 0


# --- Zstandard frames ----------------------------------------------------------------------------


def test_a_frame_comes_back():
    content = b"abc" * 100_000
    frame = compress(content)
    assert len(frame) < 200 and decompress(memoryview(frame), len(content)) == content


FRAME = compress(b"abc" * 1000)
STREAM = zstandard.ZstdCompressor().compressobj()


@pytest.mark.parametrize(
    ("frame", "size"),
    [
        (b"", 3000),
        (FRAME, 2999),
        (FRAME, 3001),
        (FRAME, 0),
        (FRAME[:-1], 3000),
        (FRAME + b"x", 3000),
        (FRAME + FRAME, 3000),
        (compress(b""), 0),
        (b"\x50\x2a\x4d\x18\3\0\0\0abc", 3000),  # a frame to be skipped
        (STREAM.compress(b"abc" * 1000) + STREAM.flush(), 3000),  # its size is not stated
        (changed(FRAME, 7, FRAME[7] | 6), 3000),  # a block of the reserved type
    ],
)
def test_a_wrong_frame_is_refused(frame, size):
    with pytest.raises(PayloadError):
        decompress(frame, size)
    with pytest.raises(naive_decoder.Refused):
        naive_decoder.read_frame(frame, size)


def test_a_frame_cannot_claim_memory():
    """Headers that state sizes or windows of up to 2^64 bytes are refused before they are used."""
    huge_content = bytes.fromhex("28b52ffd e0 ffffffffffffff7f 010000")  # a single segment
    huge_window = bytes.fromhex("28b52ffd 40 a8 b80a 010000")  # 3,000 bytes, a window of 2 GiB
    for frame in (huge_content, huge_window):
        tracemalloc.start()
        with pytest.raises(PayloadError, match="Zstandard (frame|window) of"):
            decompress(frame, 3000)
        assert tracemalloc.get_traced_memory()[1] < 100_000
        tracemalloc.stop()


# --- positions ----------------------------------------------------------------------------------


@st.composite
def positions(draw):
    """A layout of up to four tensors and ascending positions in it, few or many."""
    sizes = draw(st.lists(st.integers(0, 400), min_size=1, max_size=4))
    layout = Layout(tuple(f"t{i}" for i in range(len(sizes))), tuple((n,) for n in sizes))
    density = draw(st.sampled_from([0.0, 0.003, 0.05, 0.5, 0.97, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return layout, np.flatnonzero(rng.random(layout.size) < density)


@settings(max_examples=150, deadline=None)
@given(positions())
def test_positions_round_trip_and_the_naive_decoder_agrees(case):
    layout, indices = case
    code = encode_positions(indices, layout)
    reader = Reader(memoryview(code))
    decoded = decode_positions(reader, layout)
    reader.finish()
    assert decoded.dtype == np.int64
    np.testing.assert_array_equal(decoded, indices)
    body = naive_decoder.Body(code)
    read, counts = naive_decoder.read_positions(body, layout.sizes.tolist())
    assert read == indices.tolist() and sum(counts) == len(indices) and body.data == b""


def test_rice_codes_cost_what_the_literature_says_at_one_percent():
    """references/compression.md: Rice is within 1% of H(p)/p = 8.08 bits at p = 1%."""
    layout = Layout(("w",), ((2_000_000,),))
    indices = np.flatnonzero(np.random.default_rng(0).random(layout.size) < 0.01)
    bits = 8 * len(encode_positions(indices, layout)) / len(indices)
    assert 8.05 < bits < 8.08 * 1.01


def body(counts: list[int], unary: str, remainders: str = "", num_unary: int | None = None):
    """A positions body by hand; the streams are bit strings without padding."""

    def stream(bits: str) -> bytes:
        bits += "0" * (-len(bits) % 8)
        return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))

    length = len(stream(unary)) if num_unary is None else num_unary
    head = b"".join(n.to_bytes(4, "little") for n in (*counts, length))
    return head + stream(unary) + stream(remainders)


TWO = Layout(("a", "b"), ((8,), (40,)))  # one position in b: g = 177 * 40 // 256 = 27, k = 4


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (body([0, 0], ""), []),
        (body([8, 0], "11111111"), [0, 1, 2, 3, 4, 5, 6, 7]),
        (body([0, 1], "1", "1111"), [23]),
        (body([0, 1], "001", "0111"), [47]),  # the last entry of all
        (body([1, 1], "1 1".replace(" ", ""), "11 0000".replace(" ", "")), [3, 8]),
    ],
)
def test_positions_by_hand(code, expected):
    assert decode_positions(Reader(memoryview(code)), TWO).tolist() == expected
    assert encode_positions(np.array(expected, np.int64), TWO) == code


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"\0" * 7, "the body ends"),
        (b"\0" * 11, "the body ends"),
        (body([9, 0], "111111111"), "9 positions in a, which is smaller"),
        (body([0, 41], "1" * 41), "41 positions in b, which is smaller"),
        (body([2**32 - 1, 0], "1"), "positions in a, which is smaller"),
        (body([0, 1], "001", "1000"), "a position lies beyond its tensor"),  # 48
        (body([1, 0], "001", "00"), "a position lies beyond its tensor"),  # 8, inside of b
        (body([8, 0], "1111111"), "holds 7 gaps, 8 were announced"),
        (body([7, 0], "11111111"), "holds 8 gaps, 7 were announced"),
        (body([0, 0], "1"), "1 gaps, 0 were announced"),
        (body([0, 0], "0"), "holds 0 gaps, 0 were announced"),  # a byte of padding
        (body([8, 0], "11111111" + "0"), "holds 8 gaps, 8 were announced"),  # another one
        (body([0, 1], "1" + "0" * 55, "1111"), "longer than the layout allows"),
        (body([0, 0], "", num_unary=2**32 - 1), "longer than the layout allows"),
        (body([8, 0], "", num_unary=1), "the body ends"),
        (body([0, 1], "1"), "the body ends"),  # no remainder
        (body([0, 1], "1", "11111"), "padding after the remainders is not zero"),
        (body([0, 1], "1", "00000001"), "padding after the remainders is not zero"),
    ],
)
def test_wrong_positions_are_refused_and_named(code, message):
    with pytest.raises(PayloadError, match=re.escape(message)):
        decode_positions(Reader(memoryview(code)), TWO)


@pytest.mark.parametrize("num_tensors", range(1, 9))
def test_the_longest_unary_stream_that_an_encoder_can_write_is_accepted(num_tensors):
    """The bound on its length must not refuse the last entry of every tensor."""
    for size in range(1, 40):
        names = tuple(f"t{i}" for i in range(num_tensors))
        layout = Layout(names, ((size,),) * num_tensors)
        for indices in (layout.offsets[1:] - 1, layout.offsets[1:2] - 1, range(layout.size)):
            code = encode_positions(np.array(indices, np.int64), layout)
            assert decode_positions(Reader(memoryview(code)), layout).tolist() == list(indices)


@pytest.mark.parametrize(
    ("size", "count", "k"),
    # g = 177 * size // (256 * count) is just below and just at a power of two; eight remainders
    # of k bits are k bytes
    [(8 * 92, 8, 5), (8 * 93, 8, 6), (8 * 5924, 8, 11), (8 * 5925, 8, 12)]
    + [(1, 0, 0), (1, 1, 0), (2, 1, 0), (3, 1, 1), (3, 2, 0), (0, 0, 0)],
)
def test_the_rice_parameter_by_hand(size, count, k):
    layout = Layout(("w",), ((size,),))
    code = encode_positions(np.arange(count), layout)  # gaps of 0: a one each, and k zeros
    assert len(code) == 8 + -(-count // 8) + -(-count * k // 8)
    assert naive_decoder.remainder_bits(size, count) == k


def test_small_payloads_that_announce_much_take_no_more_memory_than_the_layout_allows():
    layout = Layout(("w",), ((100_000,),))
    for counts, num_unary in (([100_000], 0), ([1], 2**32 - 1), ([100_000], 2**32 - 1)):
        tracemalloc.start()
        with pytest.raises(PayloadError):
            decode_positions(Reader(memoryview(body(counts, "", num_unary=num_unary))), layout)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 32 * layout.size


# --- memory for payloads --------------------------------------------------------------------------


def written(payload_memory: PayloadMemory, payload: bytes) -> memoryview:
    memory = payload_memory.take(len(payload))
    memory[:] = payload
    return memory


@given(st.lists(st.lists(st.binary(max_size=30), max_size=12), max_size=4))
def test_an_outbox_keeps_a_rounds_payloads_in_the_same_memory(rounds):
    sizes, chunk = [], wire.MEMORY_CHUNK
    wire.MEMORY_CHUNK = 148  # two payloads or three
    try:
        payload_memory = PayloadMemory()
        for payloads in [*rounds, *rounds]:
            payload_memory.clear()
            kept = [written(payload_memory, payload) for payload in payloads]
            assert kept == payloads
            sizes.append(len(payload_memory.chunks))
    finally:
        wire.MEMORY_CHUNK = chunk
    assert sizes[len(rounds) :] == [max(sizes, default=0)] * len(rounds)


def test_an_outbox_takes_a_payload_larger_than_its_chunks(monkeypatch):
    monkeypatch.setattr(wire, "MEMORY_CHUNK", 8)
    payload_memory = PayloadMemory()
    payloads = [bytes([n]) * n for n in (3, 20, 5)]
    assert [written(payload_memory, payload) for payload in payloads] == payloads
