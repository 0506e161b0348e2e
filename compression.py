"""Codecs: from a vector to the bytes of a message and back.

encode() returns the payload and what the receiver will decode from it, so that a caller knows
exactly what was lost: vector == sent + residual (error feedback, Seide et al. 2014; Karimireddy
et al. 2019, arXiv 1901.09847). What to select and how to write values compose freely.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compiled import add_at
from compressors.eden import packed_size, read_eden, write_eden
from compressors.powersgd import read_powersgd, write_powersgd
from compressors.quantisers import (
    BF16,
    BUCKET,
    BUCKET_LEVELS,
    EDEN,
    FP16,
    FP32,
    LEVELS,
    PLAIN,
    POWERSGD,
    TENSOR_LEVELS,
    Buffer,
    Values,
    level_bits,
    levels_size,
    num_values,
    parse_values,
    quantise,
    read_levels,
    times,
    write_levels,
)
from layout import Layout
from wire.container import (
    CHECKSUM,
    OVERHEAD,
    Memory,
    Outbox,
    PayloadError,
    Reader,
    compress,
    decompress,
    new_memory,
    pack,
    unpack,
)
from wire.entropy import decode_integers, encode_integers
from wire.positions import decode_positions, encode_positions, pack_positions, unpack_positions

__all__ = [
    "OVERHEAD",
    "Decoded",
    "Memory",
    "NotFinite",
    "Outbox",
    "PayloadError",
    "all_finite",
    "decode",
    "encode",
    "new_memory",
    "pack_positions",
    "parse_values",
    "unpack_positions",
]
Select = Callable[[Tensor, Layout], np.ndarray]
DENSE, SPARSE, CODED, SPARSE_CODED = range(4)  # the selection byte of the container
COMPRESSED, SMALL_DENSE = 1, 2  # its flags
PACKED = {LEVELS: 16, TENSOR_LEVELS: 16, BUCKET_LEVELS: 16, EDEN: 4}  # kind: its most bits
KINDS = {
    DENSE: {FP32, FP16, BF16, *PACKED, POWERSGD},
    SPARSE: {FP32, FP16, BF16, EDEN},
    CODED: {LEVELS, BUCKET_LEVELS},
    SPARSE_CODED: {FP32, FP16, BF16, EDEN},
}
WORTH_CODING = 1 / 8  # of levels that are not zero: beyond it, packed ones are shorter or nearly so

# Decoded values are views of the payload, which is immutable, and are only ever read.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class NotFinite(ValueError):
    """The vector to encode holds inf or NaN, which no codec sends."""


@dataclass(frozen=True)
class Decoded:
    """A vector as it arrives: values at indices, zero elsewhere; indices is None for all."""

    size: int
    indices: np.ndarray | None  # int64 [n], ascending
    values: np.ndarray  # float32 [n]

    def add_to(self, vector: Tensor, weight: float = 1.0) -> None:
        """vector += weight * self, in place; vector: float32 [size] on the CPU."""
        if self.indices is None:
            vector.add_(torch.from_numpy(self.values), alpha=weight)
        else:
            add_at(vector.numpy(), self.indices, self.values, np.float32(weight))

    def dense(self, copy: bool = True) -> Tensor:
        """The whole vector, float32 [size]; without a copy it may lie in the payload: read only."""
        if self.indices is None and not copy:
            return torch.from_numpy(self.values)
        vector = torch.zeros(self.size)
        self.add_to(vector)
        return vector


@dataclass(frozen=True)
class Body:
    """What goes into the container. arrives is None where it must be read back from the bytes."""

    selection: int
    kind: int
    positions: Buffer
    values: Buffer
    flags: int = 0
    indices: np.ndarray | None = None  # int64 [n], ascending; None for all
    arrives: np.ndarray | None = None  # float32 [n]

    def __len__(self) -> int:
        return len(self.positions) + len(self.values)


def encode(
    vector: Tensor,
    layout: Layout,
    values: str = "fp32",
    select: Select | None = None,
    dense_below: int = 0,
    seed: int = 0,
    memory: Memory = new_memory,
) -> tuple[memoryview, Decoded]:
    """Encode float32 [layout.size]; return the payload and exactly what decode() makes of it.

    values: a word that parse_values() reads. select: returns the ascending int64 positions to
    send of the vector that it is given; of these, those that would arrive as zero are not sent.
    dense_below: tensors of fewer entries travel whole, as fp32. seed: of the random choices of
    qsgd, eden and powersgd. memory: gives the bytes that the payload is written on. Raises
    NotFinite, and ValueError for a word or mix that is not valid.
    """
    coder = parse_values(values)
    if not all_finite(vector):
        raise NotFinite("the vector holds inf or NaN")
    large = layout.sizes >= dense_below
    if large.all():
        body = _encode(vector, layout, coder, select, seed)
        parts = body.positions, body.values
        payload = pack(body.selection, body.kind, layout, *parts, flags=body.flags, memory=memory)
        return payload, _read_back(payload, body, layout)
    rest = layout.where(large)
    body = _encode(_pick(vector, layout, large), rest, coder, select, seed)
    small = _pick(vector, layout, ~large).cpu().numpy().astype("<f4")
    head = dense_below.to_bytes(4, "little") + small.tobytes()
    parts, flags = (head, body.positions, body.values), body.flags | SMALL_DENSE
    payload = pack(body.selection, body.kind, layout, *parts, flags=flags, memory=memory)
    return payload, _joined(layout, large, small, _read_back(payload, body, rest))


def decode(payload: bytes | memoryview, layout: Layout) -> Decoded:
    """Decode a stranger's bytes. Raises PayloadError, never anything else."""
    selection, kind, flags, body = unpack(payload, layout)
    if selection not in KINDS:
        raise PayloadError(f"byte 5: no selection has the number {selection}")
    if kind not in KINDS[selection]:
        raise PayloadError(f"byte 6: selection {selection} has no values of kind {kind}")
    if flags & COMPRESSED and (kind not in PACKED or selection == CODED) or flags > 3:
        raise PayloadError(f"byte 7: flags {flags} with selection {selection} and kind {kind}")
    reader = Reader(body)
    if not flags & SMALL_DENSE:
        return _finite(_decode(reader, selection, kind, flags, layout))
    large = layout.sizes >= int(reader.take("<u4", 1)[0])
    small = reader.take("<f4", int(layout.sizes[~large].sum()))
    rest = _decode(reader, selection, kind, flags, layout.where(large))
    return _finite(_joined(layout, large, small, rest))


# --- one body -------------------------------------------------------------------------------------


def _encode(
    vector: Tensor, layout: Layout, coder: Values, select: Select | None, seed: int
) -> Body:
    indices = None if select is None else select(vector, layout)
    if indices is not None:
        vector = vector.index_select(0, torch.from_numpy(indices).to(vector.device))
    numbers = vector.cpu().numpy()
    if coder.name in PLAIN:
        return _encode_plain(numbers, indices, layout, coder)
    if coder.name == "eden":
        rest = write_eden(numbers, coder.number, seed)
        return _sparse(EDEN, indices, layout, *_compressed(coder.number, rest))
    if coder.name == "powersgd":
        if indices is not None:
            raise ValueError("powersgd codes whole matrices: it takes no selection")
        return Body(DENSE, POWERSGD, b"", write_powersgd(numbers, layout, coder.number, seed))
    return _encode_levels(numbers, indices, layout, coder, seed)


def _encode_plain(
    numbers: np.ndarray, indices: np.ndarray | None, layout: Layout, coder: Values
) -> Body:
    kind, write, read = PLAIN[coder.name]
    values = write(numbers)
    if indices is not None:
        arrives = read(Reader(memoryview(values)), len(numbers)) != 0
        indices, values = indices[arrives], write(numbers[arrives])
    return _sparse(kind, indices, layout, values)


def _sparse(
    kind: int, indices: np.ndarray | None, layout: Layout, values: Buffer, flags: int = 0
) -> Body:
    """Values with their positions, if they have any, in the shorter of two codes."""
    if indices is None:
        return Body(DENSE, kind, b"", values, flags)
    rice = encode_positions(indices, layout)
    ones = encode_integers(indices, np.ones(len(indices), np.int16), layout)
    coded = len(ones).to_bytes(4, "little") + ones
    if len(coded) < len(rice):
        return Body(SPARSE_CODED, kind, coded, values, flags, indices)
    return Body(SPARSE, kind, rice, values, flags, indices)


def _encode_levels(
    numbers: np.ndarray, indices: np.ndarray | None, layout: Layout, coder: Values, seed: int
) -> Body:
    """Integers times scales: packed, or those that are not zero in an entropy code.

    Selected ones of int have one scale. With a scale for each tensor every level is near the
    largest, and costs about two bits more.
    """
    kind, levels, scales = quantise(coder, numbers, layout if indices is None else None, seed)
    if indices is not None:
        return _coded(kind, indices, levels, scales, layout)
    bits = level_bits(coder, levels)
    values, flags = _compressed(bits, write_levels(bits, levels, scales))
    packed = Body(DENSE, kind, b"", values, flags)
    if kind == TENSOR_LEVELS or np.count_nonzero(levels) > WORTH_CODING * len(levels):
        return packed
    coded = _coded(kind, np.arange(len(levels)), levels, scales, layout)
    return coded if len(coded) < len(packed) else packed


def _coded(
    kind: int, indices: np.ndarray, levels: np.ndarray, scales: np.ndarray, layout: Layout
) -> Body:
    kept = np.flatnonzero(levels if scales.any() else np.zeros(0))
    head = scales.astype("<f4").tobytes()
    scale = scales
    if kind == BUCKET_LEVELS:
        owners = kept // BUCKET
        counts = np.bincount(owners, minlength=len(scales)).astype("<u2")
        head = len(scales).to_bytes(4, "little") + head + counts.tobytes()
        scale = scales[owners]
    indices, levels = indices[kept], levels[kept]
    code = encode_integers(indices, levels, layout)
    return Body(CODED, kind, head, code, indices=indices, arrives=times(levels, scale))


def _compressed(bits: int, values: bytes) -> tuple[bytes, int]:
    """Packed values behind their number of bits, as a Zstandard frame if that is shorter: + flag"""
    frame = compress(values)
    if len(frame) < len(values):
        return bytes([bits]) + frame, COMPRESSED
    return bytes([bits]) + values, 0


def _decode(reader: Reader, selection: int, kind: int, flags: int, layout: Layout) -> Decoded:
    indices = None
    if selection == CODED:
        return _decode_coded(reader, kind, layout)
    if selection == SPARSE:
        indices = decode_positions(reader, layout)
    elif selection == SPARSE_CODED:
        ones = reader.take("u1", int(reader.take("<u4", 1)[0]))
        indices, levels = decode_integers(ones.data, layout)
        if (levels != 1).any():
            raise PayloadError("positions are coded as levels of 1, and one is another")
    count = layout.size if indices is None else len(indices)
    values = _read_values(reader, kind, flags, layout, count)
    return Decoded(layout.size, indices, values)


def _decode_coded(reader: Reader, kind: int, layout: Layout) -> Decoded:
    num_scales, owners = 1, 0
    if kind == BUCKET_LEVELS:
        num_scales = int(reader.take("<u4", 1)[0])
        if num_scales > -(-layout.size // BUCKET):
            raise PayloadError(f"{num_scales} scales are more than the layout allows")
    scales = reader.take("<f4", num_scales)
    if kind == BUCKET_LEVELS:
        counts = reader.take("<u2", num_scales).astype(np.int64)
    indices, levels = decode_integers(reader.rest(), layout)
    if kind == BUCKET_LEVELS:
        if counts.sum() != len(levels):
            raise PayloadError(f"buckets of {counts.sum()} levels in all hold {len(levels)}")
        owners = np.repeat(np.arange(num_scales), counts)
    return Decoded(layout.size, indices, times(levels, scales[owners]))


def _read_values(reader: Reader, kind: int, flags: int, layout: Layout, count: int) -> np.ndarray:
    """The `count` values that the rest of a body holds, float32."""
    bits = 0
    if kind in PACKED:
        bits = int(reader.take("u1", 1)[0])
        if not 1 <= bits <= PACKED[kind]:
            raise PayloadError(f"values of {bits} bits are not of kind {kind}")
    if flags & COMPRESSED:
        size = packed_size(bits, count) if kind == EDEN else levels_size(kind, bits, layout, count)
        reader = Reader(memoryview(decompress(reader.rest(), size)))
    if kind == POWERSGD:
        values = read_powersgd(reader, layout)
    elif kind == EDEN:
        values = read_eden(reader, bits, count)
    elif kind in PACKED:
        values = read_levels(reader, bits, num_values(kind, layout, count))
    else:
        values = {kind: read for kind, _, read in PLAIN.values()}[kind](reader, count)
    reader.finish()
    return values


def _read_back(payload: memoryview, body: Body, layout: Layout) -> Decoded:
    """What was sent, read from the payload: it stays as it is if the vector changes later."""
    values = body.arrives
    if values is None:
        end = len(payload) - CHECKSUM.size
        reader = Reader(payload[end - len(body.values) : end])
        count = layout.size if body.indices is None else len(body.indices)
        values = _read_values(reader, body.kind, body.flags, layout, count)
    return Decoded(layout.size, body.indices, values)


# --- small tensors dense --------------------------------------------------------------------------


def _pick(vector: Tensor, layout: Layout, chosen: np.ndarray) -> Tensor:
    """The entries of the chosen tensors, one after the other; chosen: bool [num_tensors]."""
    return torch.cat([vector[:0], *(vector[start:stop] for start, stop in _spans(layout, chosen))])


def _spans(layout: Layout, chosen: np.ndarray) -> list[tuple[int, int]]:
    spans = np.stack((layout.offsets[:-1], layout.offsets[1:]), 1)
    return [(start, stop) for start, stop in spans[chosen].tolist()]


def _joined(layout: Layout, large: np.ndarray, small: np.ndarray, rest: Decoded) -> Decoded:
    """The vector of which `small` holds the small tensors and `rest` the large ones."""
    small_places = [np.arange(start, stop) for start, stop in _spans(layout, ~large)]
    small_places = np.concatenate([np.zeros(0, np.int64), *small_places])
    if rest.indices is None:
        values = np.empty(layout.size, np.float32)
        values[small_places] = small
        done = 0
        for start, stop in _spans(layout, large):
            values[start:stop] = rest.values[done : done + stop - start]
            done += stop - start
        return Decoded(layout.size, None, values)
    sizes = layout.sizes[large]
    ends = np.cumsum(sizes)
    shifts = layout.offsets[:-1][large] - (ends - sizes)
    places = rest.indices + shifts[np.searchsorted(ends, rest.indices, side="right")]
    indices = np.concatenate((small_places, places))
    order = np.argsort(indices, kind="stable")
    values = np.concatenate((small, rest.values))
    return Decoded(layout.size, indices[order], values[order])


def _finite(decoded: Decoded) -> Decoded:
    """What was decoded. Raises PayloadError if a value is infinite or NaN."""
    if not all_finite(torch.from_numpy(decoded.values)):
        raise PayloadError("it holds a value that is not finite")
    return decoded


def all_finite(vector: Tensor) -> bool:
    """A finite sum has only finite terms; only a sum that overflowed needs the second look."""
    return math.isfinite(vector.sum()) or bool(torch.isfinite(vector).all())
