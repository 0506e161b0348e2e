"""The container that every message travels in.

docs/wire-format.md specifies every bit. A payload comes from a stranger. Whatever is wrong with it
raises PayloadError before more memory is taken than the layout allows, and nothing in it is ever
executed.
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
LARGEST_WINDOW = 1 << 17  # bytes that the window of a Zstandard frame may have whatever its content
Memory = Callable[[int], memoryview]  # returns as many bytes to write on as it is asked for
MEMORY_CHUNK = 64 << 20  # bytes that a PayloadMemory takes from the system at once


class PayloadError(ValueError):
    """A payload is not what its layout and format promise; the message says what and where."""


def new_memory(size: int) -> memoryview:
    """Return `size` bytes to write on.

    numpy asks the system for huge pages. With small ones, new memory of 45 MB takes 20 ms.
    """
    return memoryview(np.empty(size, np.uint8))


class PayloadMemory:
    """Memory for the payloads of a round. The payloads of the next round are written on it again.

    If each payload took memory of its own, training could not reuse the memory that it has freed,
    since payloads would lie in between. The system would then have to zero new pages, which takes
    ten times as long as to write a payload here.
    """

    def __init__(self):
        self.chunks: list[memoryview] = []
        self.clear()

    def clear(self) -> None:
        """Begin a new round: what take() has returned before is not valid any more."""
        self.chunk, self.used = 0, 0

    def take(self, size: int) -> memoryview:
        """Return `size` bytes to write on. They are valid until clear() is called."""
        while self.chunk < len(self.chunks):
            start, end = self.used, self.used + size
            if end <= len(self.chunks[self.chunk]):
                self.used = end + -end % 64  # the next payload begins on a cache line of its own
                return self.chunks[self.chunk][start:end]
            self.chunk, self.used = self.chunk + 1, 0
        # An anonymous map lies outside of the heap, and takes its pages only once they are written.
        self.chunks.append(memoryview(mmap.mmap(-1, max(MEMORY_CHUNK, size))))
        return self.take(size)


def pack(
    selection: int,
    kind: int,
    layout: Layout,
    *body: bytes | memoryview,
    flags: int = 0,
    memory: Memory = new_memory,
) -> memoryview:
    """Return a body in its container, read-only. `memory` gives the bytes to write it on."""
    length = sum(len(part) for part in body)
    header = HEADER.pack(MAGIC, VERSION, selection, kind, flags, layout.fingerprint, length)
    payload = memory(OVERHEAD + length)
    bytes_of, end = np.frombuffer(payload, np.uint8), 0
    for part in (header, *body):
        start, end = end, end + len(part)
        # numpy lets other threads run meanwhile; a memoryview would not.
        bytes_of[start:end] = np.frombuffer(part, np.uint8)
    CHECKSUM.pack_into(payload, end, xxhash.xxh3_64_intdigest(payload[:end]))
    return payload.toreadonly()


def unpack(payload: bytes | memoryview, layout: Layout) -> tuple[int, int, int, memoryview]:
    """Open the container. Returns (selection, kind, flags, body). Raises PayloadError."""
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
    """Reads a body from its beginning to its end and never past it."""

    def __init__(self, body: memoryview):
        self.body, self.position = body, 0

    def take(self, dtype: str, count: int) -> np.ndarray:
        """Return the next `count` items, read-only. Raises PayloadError if the body is shorter."""
        length = count * np.dtype(dtype).itemsize
        if length > len(self.body) - self.position:
            raise PayloadError(f"the body ends at byte {len(self.body)}, {length} more were due")
        items = np.frombuffer(self.body, dtype, count, self.position)
        self.position += length
        return items

    def rest(self) -> memoryview:
        """Return all that has not been read yet."""
        left = self.body[self.position :]
        self.position = len(self.body)
        return left

    def finish(self) -> None:
        """Raise PayloadError unless the whole body has been read."""
        if self.position != len(self.body):
            raise PayloadError(f"{len(self.body) - self.position} bytes are left over in the body")


def compress(data: bytes) -> bytes:
    """Return one Zstandard frame (RFC 8878), which states the size of its content."""
    return zstandard.ZstdCompressor(level=1).compress(data)


def decompress(frame: bytes | memoryview, size: int) -> bytes:
    """Return the content of a frame, which must have `size` bytes. Raises PayloadError.

    The header of the frame is checked first, so that it cannot claim more memory than that.
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
