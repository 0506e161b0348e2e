"""Fields of a few bits each, one after the other, highest bit first."""

import numpy as np

from compiled import compiled
from wire.container import PayloadError, Reader


@compiled
def _pack(fields, bits, out):
    """Write the low `bits` of each field, highest bit first. fields: int16 [n]; out: uint8."""
    held, num_held, at = 0, 0, 0
    for i in range(len(fields)):
        held = held << bits | np.int64(fields[i]) & (1 << bits) - 1
        num_held += bits
        while num_held >= 8:
            num_held -= 8
            out[at] = held >> num_held & 255
            at += 1
        held &= (1 << num_held) - 1
    if num_held:
        out[at] = held << (8 - num_held) & 255


@compiled
def _unpack(stream, bits, out):
    """Do the reverse. Returns the bits of the last byte that no field uses; they must be 0."""
    held, num_held, at = 0, 0, 0
    for i in range(len(out)):
        while num_held < bits:
            held = held << 8 | np.int64(stream[at])
            num_held += 8
            at += 1
        num_held -= bits
        out[i] = held >> num_held
        held &= (1 << num_held) - 1
    return held


def pack_bits(fields: np.ndarray, bits: int) -> bytes:
    """Pack integers [n] into n * bits bits, filled up with zeros to whole bytes."""
    out = np.empty(-(-len(fields) * bits // 8), np.uint8)
    _pack(fields.astype(np.int16, copy=False), bits, out)
    return out.tobytes()


def unpack_bits(reader: Reader, count: int, bits: int) -> np.ndarray:
    """Return `count` fields, int16 [count]. Only fields of 16 bits have a sign.

    Raises PayloadError.
    """
    stream = reader.take("u1", -(-count * bits // 8))
    fields = np.empty(count, np.int16)
    if _unpack(stream, bits, fields) != 0:
        raise PayloadError("the padding after packed values is not zero")
    return fields
