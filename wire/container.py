"""The container that every message travels in.

docs/wire-format.md specifies every bit. A payload comes from a stranger: whatever is wrong with it
ends in PayloadError, before memory beyond the layout is taken, and nothing is ever executed.
"""

import mmap
import struct
from collections.abc import Callable

import numpy as np
import xxhash
import zstandard

from layout import Layout

MAGIC = b"FLUP"
VERSION = 3
HEADER = struct.Struct("<4sBBBBQQ")  # magic, version, selection, kind, flags, layout, body bytes
CHECKSUM = struct.Struct("<Q")
OVERHEAD = HEADER.size + CHECKSUM.size  # bytes of a payload that are not its body
LARGEST_WINDOW = 1 << 17  # of a Zstandard frame whose content is smaller
Memory = Callable[[int], memoryview]  # gives so many bytes to write on
OUTBOX_CHUNK = 64 << 20  # bytes


class PayloadError(ValueError):
    """A payload is not what its layout and format promise; the message says what and where."""


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
