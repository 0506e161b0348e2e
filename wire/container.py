"""The bits on the wire: one container for every message, and the coder of positions.

docs/wire-format.md specifies every bit. A payload comes from a stranger: whatever is wrong with it
ends in PayloadError, before memory beyond the layout is taken, and nothing is ever executed.
"""

import hashlib
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash
import zstandard

MAGIC = b"FLUP"
VERSION = 3
HEADER = struct.Struct("<4sBBBBQQ")  # magic, version, selection, kind, flags, layout, body bytes
CHECKSUM = struct.Struct("<Q")
OVERHEAD = HEADER.size + CHECKSUM.size  # bytes of a payload that are not its body
LARGEST_WINDOW = 1 << 17  # of a Zstandard frame whose content is smaller
Memory = Callable[[int], memoryview]  # gives so many bytes to write on
OUTBOX_CHUNK = 64 << 20  # bytes
POSITIONS = 4  # the selection byte of a payload without values, whose next byte is one of:
RICE, BITMAP = 0, 1


class PayloadError(ValueError):
    """A payload is not what its layout and format promise; the message says what and where."""


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors that lie one after the other in a flat vector.

    agreed: what else both ends must have agreed on; empty but for the layouts that on() makes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    agreed: bytes = b""

    @cached_property
    def sizes(self) -> np.ndarray:  # int64 [num_tensors]
        return np.array([int(np.prod(shape)) for shape in self.shapes], np.int64)

    @cached_property
    def offsets(self) -> np.ndarray:  # int64 [num_tensors + 1]
        return np.concatenate(([0], np.cumsum(self.sizes))).astype(np.int64)

    @property
    def size(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def fingerprint(self) -> int:
        """64 bits by which both ends know that they mean the same vector."""
        tensors = zip(self.names, self.shapes, strict=True)
        text = ";".join(f"{_escaped(name)}:{','.join(map(str, shape))}" for name, shape in tensors)
        return int.from_bytes(_digest(self.agreed + text.encode()), "little")

    def on(self, positions: np.ndarray) -> "Layout":
        """The layout of the entries at `positions`, which both ends know: a shared mask.

        positions: integers [n], ascending. What is left of each tensor has the shape (count,).
        Ends that disagree about the mask have different fingerprints.
        """
        positions = np.ascontiguousarray(positions, "<u8")
        counts = np.diff(np.searchsorted(positions, self.offsets.astype(np.uint64))).tolist()
        agreed = _digest(self.fingerprint.to_bytes(8, "little") + positions.tobytes())
        return Layout(self.names, tuple((count,) for count in counts), agreed)

    def where(self, chosen: np.ndarray) -> "Layout":
        """The layout of the chosen tensors alone; chosen: bool [num_tensors]."""
        tensors = [
            tensor
            for tensor, stays in zip(zip(self.names, self.shapes, strict=True), chosen, strict=True)
            if stays
        ]
        names, shapes = zip(*tensors, strict=True) if tensors else ((), ())
        return Layout(names, shapes, self.agreed)


def _escaped(name: str) -> str:
    """The name with a backslash before what separates names and shapes, so that none collide."""
    return name.replace("\\", "\\\\").replace(";", "\\;").replace(":", "\\:")


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def new_memory(size: int) -> memoryview:
    """`size` bytes of numpy's, which asks for huge pages: new small ones for 45 MB take 20 ms."""
    return memoryview(np.empty(size, np.uint8))


class Outbox:
    """Memory for the payloads of a round, which those of the next round take again.

    One by one among what training takes and frees, they would keep it from finding its memory
    again: the kernel then zeroes new pages, at ten times the cost of writing a payload here.
    """

    def __init__(self):
        self.chunks: list[memoryview] = []
        self.clear()

    def clear(self) -> None:
        """What take() has returned is not valid any more."""
        self.chunk, self.used = 0, 0

    def take(self, size: int) -> memoryview:
        """`size` bytes to write on, until clear()."""
        while self.chunk < len(self.chunks):
            start, end = self.used, self.used + size
            if end <= len(self.chunks[self.chunk]):
                self.used = end + -end % 64  # a cache line
                return self.chunks[self.chunk][start:end]
            self.chunk, self.used = self.chunk + 1, 0
        # Outside the heap, and its pages are taken only once they are written.
        self.chunks.append(memoryview(mmap.mmap(-1, max(OUTBOX_CHUNK, size))))
        return self.take(size)


def pack(
    selection: int,
    kind: int,
    layout: Layout,
    *body: bytes | memoryview,
    flags: int = 0,
    memory: Memory = new_memory,
) -> memoryview:
    """Put a body into the container, which gets its bytes from `memory`; read-only."""
    length = sum(len(part) for part in body)
    header = HEADER.pack(MAGIC, VERSION, selection, kind, flags, layout.fingerprint, length)
    payload = memory(OVERHEAD + length)
    end = 0
    for part in (header, *body):
        start, end = end, end + len(part)
        payload[start:end] = part
    CHECKSUM.pack_into(payload, end, xxhash.xxh3_64_intdigest(payload[:end]))
    return payload.toreadonly()


def unpack(payload: bytes | memoryview, layout: Layout) -> tuple[int, int, int, memoryview]:
    """Return (selection, kind, flags, body). Raises PayloadError."""
    if len(payload) < OVERHEAD:
        raise PayloadError(f"{len(payload)} bytes are too short for a payload")
    magic, version, selection, kind, flags, fingerprint, length = HEADER.unpack_from(payload)
    if magic != MAGIC:
        raise PayloadError(f"byte 0: magic is {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise PayloadError(f"byte 4: version {version} is not {VERSION}")
    if length != len(payload) - OVERHEAD:
        raise PayloadError(f"byte 16: a body of {length} bytes in a payload of {len(payload)}")
    view = memoryview(payload)
    if CHECKSUM.unpack(view[-CHECKSUM.size :])[0] != xxhash.xxh3_64_intdigest(view[:-8]):
        raise PayloadError("the checksum does not match: the payload was changed on its way")
    if fingerprint != layout.fingerprint:
        raise PayloadError("byte 8: made for another layout (other tensors, names or shapes)")
    return selection, kind, flags, view[HEADER.size : -CHECKSUM.size]


class Reader:
    """Reads a body from front to back and never past its end."""

    def __init__(self, body: memoryview):
        self.body, self.position = body, 0

    def take(self, dtype: str, count: int) -> np.ndarray:
        """The next `count` items, read-only. Raises PayloadError if they are not there."""
        length = count * np.dtype(dtype).itemsize
        if length > len(self.body) - self.position:
            raise PayloadError(f"the body ends at byte {len(self.body)}, {length} more were due")
        items = np.frombuffer(self.body, dtype, count, self.position)
        self.position += length
        return items

    def rest(self) -> memoryview:
        """All that is left."""
        left = self.body[self.position :]
        self.position = len(self.body)
        return left

    def finish(self) -> None:
        if self.position != len(self.body):
            raise PayloadError(f"{len(self.body) - self.position} bytes are left over in the body")


def compress(data: bytes) -> bytes:
    """One Zstandard frame (RFC 8878) that states the size of its content."""
    return zstandard.ZstdCompressor(level=1).compress(data)


def decompress(frame: bytes | memoryview, size: int) -> bytes:
    """The content of a frame, which must have `size` bytes. Raises PayloadError.

    What the frame says of itself is checked first, so that it can claim no more memory than that.
    """
    frame = bytes(frame)
    try:
        stated = zstandard.get_frame_parameters(frame)
        if frame[:4] != zstandard.FRAME_HEADER or stated.dict_id or size == 0:
            raise PayloadError("no Zstandard frame, one with a dictionary, or one for nothing")
        if stated.content_size != size:
            raise PayloadError(f"a Zstandard frame of {stated.content_size} bytes, not of {size}")
        if stated.window_size > max(size, LARGEST_WINDOW):
            raise PayloadError(f"a Zstandard window of {stated.window_size} bytes")
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PayloadError(f"not one Zstandard frame: {error}") from None


def encode_positions(indices: np.ndarray, layout: Layout) -> bytes:
    """Code ascending int64 indices: counts per tensor, then Rice codes of the gaps (Rice 1979).

    A gap g of tensor t is written as g >> k zeros and a one in the first stream, and the low k
    bits of g in the second; k follows from the tensor's count, so it is not sent.
    """
    tensor = np.searchsorted(layout.offsets, indices, side="right") - 1
    counts = np.bincount(tensor, minlength=len(layout.sizes))
    first = np.r_[True, tensor[1:] != tensor[:-1]] if len(indices) else np.zeros(0, bool)
    previous = np.r_[-1, indices[:-1]] if len(indices) else indices
    gaps = indices - np.where(first, layout.offsets[tensor], previous + 1)
    k = _rice_parameters(counts, layout.sizes)[tensor]
    ones = np.cumsum((gaps >> k) + 1) - 1  # where each unary code ends
    unary = np.zeros(ones[-1] + 1 if len(ones) else 0, np.uint8)
    unary[ones] = 1
    shifts, owners = _bit_shifts(k)
    remainders = (gaps[owners] >> shifts & 1).astype(np.uint8)
    head = np.append(counts, -(-len(unary) // 8)).astype("<u4").tobytes()
    return b"".join((head, np.packbits(unary).tobytes(), np.packbits(remainders).tobytes()))


def decode_positions(reader: Reader, layout: Layout) -> np.ndarray:
    """Return ascending int64 indices. Raises PayloadError."""
    counts = reader.take("<u4", len(layout.sizes)).astype(np.int64)
    if (counts > layout.sizes).any():
        tensor = int(np.argmax(counts > layout.sizes))
        raise PayloadError(
            f"{counts[tensor]} positions in {layout.names[tensor]}, which is smaller"
        )
    total = int(counts.sum())
    k = _rice_parameters(counts, layout.sizes)
    tensor = np.repeat(np.arange(len(counts)), counts)
    num_unary = int(reader.take("<u4", 1)[0])
    # A tensor of s entries has gaps that add up to at most s, so its unary code is bounded.
    if num_unary * 8 > int((counts + (layout.sizes >> k)).sum()) + 7:
        raise PayloadError(f"a unary stream of {num_unary} bytes is longer than the layout allows")
    unary = np.unpackbits(reader.take("u1", num_unary))
    ones = np.flatnonzero(unary)
    if len(ones) != total or len(unary) - (ones[-1] + 1 if total else 0) >= 8:
        raise PayloadError(f"the unary stream holds {len(ones)} gaps, {total} were announced")
    quotients = np.diff(ones, prepend=-1) - 1
    shifts, owners = _bit_shifts(k[tensor])
    bits = np.unpackbits(reader.take("u1", -(-len(shifts) // 8)))
    if bits[len(shifts) :].any():
        raise PayloadError("the padding after the remainders is not zero")
    gaps = quotients << k[tensor]
    np.add.at(gaps, owners, bits[: len(shifts)].astype(np.int64) << shifts)
    # Positions within the vector: a running sum that starts anew in each tensor.
    ends = np.cumsum(gaps + 1)
    starts = np.cumsum(counts) - counts
    before = np.where(starts > 0, ends[np.maximum(starts, 1) - 1], 0) if total else starts
    indices = ends - 1 - before[tensor] + layout.offsets[tensor]
    if total and (indices >= layout.offsets[tensor + 1]).any():
        raise PayloadError("a position lies beyond its tensor")
    return indices


def _rice_parameters(counts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """k = floor(log2(ln 2 * size / count)), at least 0, in integers (ln 2 is about 177 / 256)."""
    mean_gaps = sizes * 177 // (256 * np.maximum(counts, 1))
    return np.array([max(int(gap).bit_length() - 1, 0) for gap in mean_gaps], np.int64)


def _bit_shifts(k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For numbers of k[i] bits written high bit first: each bit's shift, and its number's index."""
    owners = np.repeat(np.arange(len(k)), k)
    ends = np.cumsum(k)
    return ends[owners] - 1 - np.arange(len(owners)), owners


def pack_positions(positions: np.ndarray, layout: Layout) -> memoryview:
    """A payload of ascending int64 positions alone: Rice codes, or a bitmap where it is shorter."""
    marks = np.zeros(layout.size, np.uint8)
    marks[positions] = 1
    bodies = encode_positions(positions, layout), np.packbits(marks).tobytes()
    coder = RICE if len(bodies[RICE]) <= len(bodies[BITMAP]) else BITMAP
    return pack(POSITIONS, coder, layout, bodies[coder])


def unpack_positions(payload: bytes | memoryview, layout: Layout) -> np.ndarray:
    """The positions of pack_positions(), int64, ascending. Raises PayloadError."""
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
