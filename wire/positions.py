"""Positions on the wire: Rice codes of the gaps between them, and payloads of positions alone."""

import numpy as np

from compiled import compiled, index
from layout import Layout
from wire.container import PayloadError, Reader, pack, unpack

POSITIONS = 4  # the selection byte of a payload that holds positions and no values
RICE, BITMAP = 0, 1  # its next byte: how the positions are written


def encode_positions(indices: np.ndarray, layout: Layout) -> bytes:
    """Code ascending int64 indices: a count for each tensor, then Rice codes (Rice 1979).

    A gap g is written as g >> k zeros and a one in the first stream, and as its low k bits in the
    second. k follows from the size of the tensor and its count, so it is not sent. Raises
    ValueError for other indices.
    """
    indices = np.ascontiguousarray(indices, np.int64)
    counts = np.diff(np.searchsorted(indices, layout.offsets))
    k = _rice_parameters(counts, layout.sizes)
    # The gaps of a tensor add up to its size at most, so that its unary code is bounded.
    unary = np.zeros(-(-int((counts + (layout.sizes >> k)).sum()) // 8), np.uint8)
    remainders = np.empty(-(-int((k * counts).sum()) // 8), np.uint8)
    num_unary = _write_gaps(indices, counts, k, layout.offsets, unary, remainders)
    if num_unary < 0 or counts.sum() < len(indices):
        raise ValueError("positions must ascend and lie within the layout")
    head = np.append(counts, num_unary).astype("<u4").tobytes()
    return b"".join((head, unary[:num_unary].tobytes(), remainders.tobytes()))


@compiled
def _write_gaps(indices, counts, k, offsets, unary, remainders):
    """Write the gaps' two streams; return how many bytes of `unary`, which holds zeros, are used.

    counts, k: of each tensor, int64; unary, remainders: uint8. -1: the indices do not ascend, or do
    not lie within the layout.
    """
    bit, byte, held, num_held, i = 0, 0, 0, 0, 0
    for t in range(len(counts)):
        position = offsets[t]
        for _ in range(counts[t]):
            gap = indices[index(i)] - position
            if gap < 0 or indices[index(i)] >= offsets[t + 1]:
                return -1
            bit += gap >> k[t]
            unary[index(bit >> 3)] |= np.uint8(128 >> (bit & 7))
            bit += 1
            held = held << k[t] | gap & (1 << k[t]) - 1
            num_held += k[t]
            while num_held >= 8:
                num_held -= 8
                remainders[index(byte)] = held >> num_held & 255
                byte += 1
            held &= (1 << num_held) - 1
            position = indices[index(i)] + 1
            i += 1
    if num_held:
        remainders[index(byte)] = held << 8 - num_held
    return bit + 7 >> 3


def decode_positions(reader: Reader, layout: Layout, most: int | None = None) -> np.ndarray:
    """Return ascending int64 indices. Raises PayloadError.

    most: how many positions there may be; None means as many as there are entries. Takes 8 bytes
    for each announced position.
    """
    counts = reader.take("<u4", len(layout.sizes)).astype(np.int64)
    if (counts > layout.sizes).any():
        tensor = int(np.argmax(counts > layout.sizes))
        raise PayloadError(
            f"{counts[tensor]} positions in {layout.names[tensor]}, which is smaller"
        )
    total = int(counts.sum())
    if most is not None and total > most:
        raise PayloadError(f"{total} positions where at most {most} are due")
    k = _rice_parameters(counts, layout.sizes)
    num_unary = int(reader.take("<u4", 1)[0])
    # A tensor of s entries has gaps that add up to at most s, so its unary code is bounded.
    if num_unary * 8 > int((counts + (layout.sizes >> k)).sum()) + 7:
        raise PayloadError(f"a unary stream of {num_unary} bytes is longer than the layout allows")
    unary = reader.take("u1", num_unary)
    ones = int(np.bitwise_count(unary).sum())
    if ones != total or num_unary and unary[-1] == 0:
        raise PayloadError(f"the unary stream holds {ones} gaps, {total} were announced")
    remainders = reader.take("u1", -(-int((k * counts).sum()) // 8))
    indices = np.empty(total, np.int64)
    num_read, left_over = _read_gaps(unary, remainders, counts, k, layout.offsets, indices)
    if num_read < total:
        raise PayloadError("a position lies beyond its tensor")
    if left_over:
        raise PayloadError("the padding after the remainders is not zero")
    return indices


@compiled
def _read_gaps(unary, remainders, counts, k, offsets, indices):
    """Turn gaps into indices. Returns (how many lie within their tensors, the bits left over).

    The unary stream holds a one for each of them.
    """
    bit, byte, held, num_held, i = 0, 0, 0, 0, 0
    for t in range(len(counts)):
        position, end = offsets[t], offsets[t + 1]
        for _ in range(counts[t]):
            gap = 0
            while not unary[index(bit >> 3)] << (bit & 7) & 128:
                gap += 1
                bit += 1
            bit += 1
            while num_held < k[t]:
                held = held << 8 | np.int64(remainders[index(byte)])
                num_held += 8
                byte += 1
            num_held -= k[t]
            if gap > end - position >> k[t]:  # so that nothing overflows below
                return i, held
            position += (gap << k[t]) + (held >> num_held)
            held &= (1 << num_held) - 1
            if position >= end:
                return i, held
            indices[index(i)] = position
            position += 1
            i += 1
    return i, held


def _rice_parameters(counts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return k = floor(log2(ln 2 * size / count)), at least 0, int64 [num_tensors].

    It is computed in integers, so that it is equal on every machine; ln 2 is about 177 / 256.
    """
    mean_gaps = sizes * 177 // (256 * np.maximum(counts, 1))
    return np.array([max(int(gap).bit_length() - 1, 0) for gap in mean_gaps], np.int64)


def pack_positions(positions: np.ndarray, layout: Layout) -> memoryview:
    """Return a payload of ascending int64 positions: Rice codes, or a bitmap if that is shorter."""
    marks = np.zeros(layout.size, np.uint8)
    marks[positions] = 1
    bodies = encode_positions(positions, layout), np.packbits(marks).tobytes()
    coder = RICE if len(bodies[RICE]) <= len(bodies[BITMAP]) else BITMAP
    return pack(POSITIONS, coder, layout, bodies[coder])


def unpack_positions(payload: bytes | memoryview, layout: Layout) -> np.ndarray:
    """Return the positions that pack_positions() was given: int64, ascending.

    Raises PayloadError.
    """
    selection, coder, flags, body = unpack(payload, layout)
    if selection != POSITIONS or coder not in (RICE, BITMAP) or flags:
        raise PayloadError(f"byte 5: {selection}, {coder}, {flags} announces no positions alone")
    reader = Reader(body)
    if coder == RICE:
        positions = decode_positions(reader, layout)
    else:
        marks = np.unpackbits(reader.take("u1", -(-layout.size // 8)))
        if marks[layout.size :].any():
            raise PayloadError("the padding after the bitmap is not zero")
        positions = np.flatnonzero(marks)
    reader.finish()
    return positions
