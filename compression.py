"""Codecs: from a vector to the bytes of a message and back.

encode() returns the payload and what the receiver will decode from it, so that a caller knows
exactly what was lost: vector == sent + residual (error feedback, Seide et al. 2014; Karimireddy
et al. 2019, arXiv 1901.09847).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entropy import decode_integers, encode_integers
from wire import (
    CHECKSUM,
    Layout,
    PayloadError,
    Reader,
    decode_positions,
    encode_positions,
    pack,
    unpack,
)

Buffer = bytes | memoryview
DENSE, SPARSE, CODED = 0, 1, 2  # the selection byte of the container
INT8 = 3  # the number of int8 among VALUES; sparse int8 is CODED, the other kinds are SPARSE
LARGEST_LEVEL = 127
FP16_MAX = torch.finfo(torch.float16).max
BF16_MAX = torch.finfo(torch.bfloat16).max

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
        else:  # the indices are distinct, so numpy's buffered += loses nothing
            vector.numpy()[self.indices] += self.values * np.float32(weight)

    def dense(self) -> Tensor:
        """The whole vector, float32 [size]."""
        vector = torch.zeros(self.size)
        self.add_to(vector)
        return vector


def encode(
    vector: Tensor,
    layout: Layout,
    values: str = "fp32",
    select: Callable[[Tensor, Layout], np.ndarray] | None = None,
    dense_below: int = 0,
    seed: int = 0,
) -> tuple[bytes, Decoded]:
    """Encode float32 [layout.size], or only its entries that `select` names.

    values is one of VALUES. Of selected entries, those that would arrive as zero are not sent.
    Returns the payload and exactly what decode() makes of it. Raises NotFinite.
    """
    if not _all_finite(vector):
        raise NotFinite("the vector holds inf or NaN")
    indices = select(vector, layout) if select else None
    code, write, read = VALUES[values]
    numbers, bounds, positions = vector.cpu().numpy(), layout.offsets, b""
    if indices is not None and code == INT8:
        return _encode_levels(numbers[indices], indices, layout)
    if indices is not None:
        numbers, bounds = numbers[indices], np.searchsorted(indices, layout.offsets)
        arrives = read(Reader(memoryview(write(numbers, bounds))), bounds) != 0
        numbers, indices = numbers[arrives], indices[arrives]
        bounds = np.searchsorted(indices, layout.offsets)
        positions = encode_positions(indices, layout)
    body = write(numbers, bounds)
    selection = DENSE if indices is None else SPARSE
    payload = pack(selection, code, layout, positions, body)
    # Read back from the payload: what the receiver will see, also if `vector` changes later.
    written = memoryview(payload)[len(payload) - CHECKSUM.size - len(body) :]
    return payload, Decoded(layout.size, indices, read(Reader(written), bounds))


def decode(payload: bytes, layout: Layout) -> Decoded:
    """Decode a stranger's bytes. Raises PayloadError, never anything else."""
    selection, code, body = unpack(payload, layout)
    readers = {code: read for code, _, read in VALUES.values()}
    if selection not in (DENSE, SPARSE, CODED):
        raise PayloadError(f"byte 5: no selection has the number {selection}")
    if code not in readers:
        raise PayloadError(f"byte 6: no kind of values has the number {code}")
    if selection != DENSE and (selection == CODED) != (code == INT8):
        raise PayloadError(f"byte 6: selection {selection} has no values of kind {code}")
    if selection == CODED:
        return _decode_levels(body, layout)
    reader = Reader(body)
    indices = decode_positions(reader, layout) if selection == SPARSE else None
    bounds = layout.offsets if indices is None else np.searchsorted(indices, layout.offsets)
    arrived = readers[code](reader, bounds)
    reader.finish()
    return _finite(Decoded(layout.size, indices, arrived))


def _encode_levels(
    numbers: np.ndarray, indices: np.ndarray, layout: Layout
) -> tuple[bytes, Decoded]:
    """Sparse int8: one scale for the whole vector, then positions and levels in one code.

    With a scale for each tensor every level is near the largest, and costs about two bits more.
    """
    scale = _scales(np.abs(numbers).max(initial=0))
    levels = _levels(numbers, scale)
    indices, levels = indices[levels != 0], levels[levels != 0]
    body = encode_integers(indices, levels, layout)
    payload = pack(CODED, INT8, layout, scale.tobytes(), body)
    return payload, Decoded(layout.size, indices, levels * scale)


def _decode_levels(body: memoryview, layout: Layout) -> Decoded:
    scale = Reader(body[:4]).take("<f4", 1)
    indices, levels = decode_integers(body[4:], layout)
    if np.abs(levels).max(initial=0) > LARGEST_LEVEL:
        raise PayloadError(f"a level lies beyond {LARGEST_LEVEL}")
    with np.errstate(over="ignore", invalid="ignore"):
        return _finite(Decoded(layout.size, indices, levels * scale))


def _finite(decoded: Decoded) -> Decoded:
    """What was decoded. Raises PayloadError if a value is infinite or NaN."""
    if not _all_finite(torch.from_numpy(decoded.values)):
        raise PayloadError("it holds a value that is not finite")
    return decoded


# A writer turns float32 [n] into bytes and a reader turns them into the float32 [n] that arrive;
# bounds [num_tensors + 1] say that tensor t owns the entries bounds[t]:bounds[t + 1].


def _write_fp32(numbers: np.ndarray, bounds: np.ndarray) -> Buffer:
    return memoryview(numbers.astype("<f4", copy=False)).cast("B")


def _read_fp32(reader: Reader, bounds: np.ndarray) -> np.ndarray:
    return reader.take("<f4", int(bounds[-1]))


def _write_fp16(numbers: np.ndarray, bounds: np.ndarray) -> Buffer:
    return np.clip(numbers, -FP16_MAX, FP16_MAX).astype("<f2").tobytes()


def _read_fp16(reader: Reader, bounds: np.ndarray) -> np.ndarray:
    return reader.take("<f2", int(bounds[-1])).astype(np.float32)


def _write_bf16(numbers: np.ndarray, bounds: np.ndarray) -> Buffer:
    halves = torch.from_numpy(np.clip(numbers, -BF16_MAX, BF16_MAX)).to(torch.bfloat16)
    return halves.view(torch.int16).numpy().astype("<i2").tobytes()


def _read_bf16(reader: Reader, bounds: np.ndarray) -> np.ndarray:
    high = reader.take("<u2", int(bounds[-1])).astype(np.uint32)  # the upper half of a float32
    return (high << 16).view(np.float32)


def _write_int8(numbers: np.ndarray, bounds: np.ndarray) -> Buffer:
    filled = bounds[:-1] < bounds[1:]
    largest = np.zeros(len(filled))
    if filled.any():
        largest[filled] = np.maximum.reduceat(np.abs(numbers), bounds[:-1][filled])
    scales = _scales(largest)
    levels = _levels(numbers, np.repeat(scales, np.diff(bounds)))
    return scales[filled].tobytes() + levels.tobytes()


def _scales(largest: np.ndarray) -> np.ndarray:
    """largest / 127 in float32 [n], rounded down so that 127 * scale cannot overflow."""
    largest = np.atleast_1d(largest).astype(np.float64)
    scales = (largest / LARGEST_LEVEL).astype("<f4")
    too_large = scales.astype(np.float64) * LARGEST_LEVEL > largest
    scales[too_large] = np.nextafter(scales[too_large], np.float32(0))
    return scales


def _levels(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """numbers / scales to the nearest of -127..127, int8; 0 where the scale is 0."""
    scales = np.broadcast_to(scales, numbers.shape)
    levels = np.divide(numbers, scales, out=np.zeros_like(numbers), where=scales > 0)
    return np.clip(np.rint(levels), -LARGEST_LEVEL, LARGEST_LEVEL).astype(np.int8)


def _read_int8(reader: Reader, bounds: np.ndarray) -> np.ndarray:
    counts = np.diff(bounds)
    scales = reader.take("<f4", int((counts > 0).sum()))
    levels = reader.take("i1", int(bounds[-1]))
    with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what is not finite
        return levels * np.repeat(scales, counts[counts > 0])


# name: (number in the container, writer, reader). fp16 and bf16 round to nearest and clamp to
# their largest finite number; int8 is round(v / scale) with scale = max abs(v) / 127 per tensor
# (of selected entries: of all of them, see _encode_levels).
VALUES = {
    "fp32": (0, _write_fp32, _read_fp32),
    "fp16": (1, _write_fp16, _read_fp16),
    "bf16": (2, _write_bf16, _read_bf16),
    "int8": (INT8, _write_int8, _read_int8),
}


def _all_finite(vector: Tensor) -> bool:
    """A finite sum has only finite terms; only a sum that overflowed needs the second look."""
    return bool(torch.isfinite(vector.sum())) or bool(torch.isfinite(vector).all())
