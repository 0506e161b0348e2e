"""Codecs: from a vector to the bytes of a message and back.

encode() returns the payload and what the receiver will decode from it, so that a caller knows
exactly what was lost: vector == sent + residual (error feedback, Seide et al. 2014; Karimireddy
et al. 2019, arXiv 1901.09847). What to select and how to write values compose freely.

torch is imported where tensors are made: the command line reads the table without waiting for it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compiled import add_at
from compressors.bounded import Bounded
from compressors.coder import CODED, COMPRESSED, SMALL_DENSE, SPARSE, SPARSE_CODED, Body, Coder
from compressors.eden import Eden
from compressors.linear import Linear
from compressors.plain import Bf16, Fp16, Fp32
from compressors.powersgd import PowerSgd
from compressors.qsgd import Qsgd
from compressors.sign import Sign
from compressors.ternary import Ternary
from layout import Layout
from wire.container import (
    CHECKSUM,
    OVERHEAD,
    Memory,
    Outbox,
    PayloadError,
    Reader,
    new_memory,
    pack,
    unpack,
)
from wire.entropy import decode_integers
from wire.positions import decode_positions, pack_positions, unpack_positions

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CODERS",
    "OVERHEAD",
    "Coder",
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
    "parse_coder",
    "unpack_positions",
]

# A new compressor is a file of its own, its import above, and a line here.
CODERS: list[type[Coder]] = [
    Fp32,
    Fp16,
    Bf16,
    Linear,
    Qsgd,
    Ternary,
    Sign,
    Eden,
    Bounded,
    PowerSgd,
]

Select = Callable[["Tensor", Layout], np.ndarray]

# Decoded values are views of the payload, which is immutable, and are only ever read.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def parse_coder(word: str) -> Coder:
    """The coder of a word such as int8 or bounded(0.01). Raises ValueError with the valid forms."""
    for coder in CODERS:
        number = coder.words.number_in(word)
        if number is not None:
            return coder(number)
    valid = ", ".join(str(coder.words) for coder in CODERS)
    raise ValueError(f"{word!r} is no way to send values; valid are {valid}")


class NotFinite(ValueError):
    """The vector to encode holds inf or NaN, which no codec sends."""


@dataclass(frozen=True)
class Decoded:
    """A vector as it arrives: values at indices, zero elsewhere."""

    size: int
    indices: np.ndarray | None  # int64 [n], ascending; None means that all values travelled
    values: np.ndarray  # float32 [n]

    def add_to(self, vector: Tensor, weight: float = 1.0) -> None:
        """vector += weight * self, in place; vector: float32 [size] on the CPU."""
        if self.indices is None:
            vector.add_(_as_tensor(self.values), alpha=weight)
        else:
            add_at(vector.numpy(), self.indices, self.values, np.float32(weight))

    def dense(self, copy: bool = True) -> Tensor:
        """The whole vector, float32 [size]; without a copy it may lie in the payload: read only."""
        import torch

        if self.indices is None and not copy:
            return _as_tensor(self.values)
        vector = torch.zeros(self.size)
        self.add_to(vector)
        return vector


def encode(
    vector: Tensor,
    layout: Layout,
    values: str | Coder = "fp32",
    select: Select | None = None,
    dense_below: int = 0,
    seed: int = 0,
    memory: Memory = new_memory,
) -> tuple[memoryview, Decoded]:
    """Encode float32 [layout.size]; return the payload and exactly what decode() makes of it.

    values: a coder, or a word that parse_coder() reads. select: returns the ascending int64
    positions to send of the vector that it is given; those whose values would arrive as zero are
    not sent. dense_below: tensors of fewer entries travel whole, as fp32. seed: of the random
    choices of qsgd, eden and powersgd. memory: gives the bytes that the payload is written on.
    Raises NotFinite, and ValueError for a word or mix that is not valid.
    """
    coder = parse_coder(values) if isinstance(values, str) else values
    if not all_finite(vector):
        raise NotFinite("the vector holds inf or NaN")
    if select is not None and not coder.takes_selection:
        raise ValueError(f"{coder} codes whole tensors: it takes no selection")
    large = layout.sizes >= dense_below
    if large.all():
        body = _encode(vector, layout, coder, select, seed)
        parts = body.positions, body.values
        payload = pack(body.selection, body.kind, layout, *parts, flags=body.flags, memory=memory)
        return payload, _read_back(payload, body, layout, coder)
    rest = layout.where(large)
    body = _encode(_pick(vector, layout, large), rest, coder, select, seed)
    small = _pick(vector, layout, ~large).cpu().numpy().astype("<f4")
    head = dense_below.to_bytes(4, "little") + small.tobytes()
    parts, flags = (head, body.positions, body.values), body.flags | SMALL_DENSE
    payload = pack(body.selection, body.kind, layout, *parts, flags=flags, memory=memory)
    return payload, _joined(layout, large, small, _read_back(payload, body, rest, coder))


def decode(payload: bytes | memoryview, layout: Layout) -> Decoded:
    """Decode a stranger's bytes. Raises PayloadError, never anything else."""
    selection, kind, flags, body = unpack(payload, layout)
    coder = _coder_of(selection, kind)
    may_be_compressed = coder.compressible and selection != CODED
    if flags & COMPRESSED and not may_be_compressed or flags > 3:
        raise PayloadError(f"byte 7: flags {flags} with selection {selection} and kind {kind}")
    reader = Reader(body)
    if not flags & SMALL_DENSE:
        return _finite(_decode(reader, selection, flags, layout, coder))
    large = layout.sizes >= int(reader.take("<u4", 1)[0])
    small = reader.take("<f4", int(layout.sizes[~large].sum()))
    rest = _decode(reader, selection, flags, layout.where(large), coder)
    return _finite(_joined(layout, large, small, rest))


# --- one body -------------------------------------------------------------------------------------


def _encode(vector: Tensor, layout: Layout, coder: Coder, select: Select | None, seed: int) -> Body:
    indices = None if select is None else select(vector, layout)
    if indices is not None:
        vector = vector.index_select(0, _as_tensor(indices).to(vector.device))
    return coder.encode(vector.cpu().numpy(), indices, layout, seed)


def _read_back(payload: memoryview, body: Body, layout: Layout, coder: Coder) -> Decoded:
    """What was sent, read from the payload: it stays as it is if the vector changes later."""
    values = body.arrives
    if values is None:
        end = len(payload) - CHECKSUM.size
        reader = Reader(payload[end - len(body.values) : end])
        count = layout.size if body.indices is None else len(body.indices)
        values = coder.decode(reader, body.flags, layout, count)
    return Decoded(layout.size, body.indices, values)


def _coder_of(selection: int, kind: int) -> type[Coder]:
    """A coder that reads payloads with these bytes. Raises PayloadError if there is none."""
    if selection > SPARSE_CODED:
        raise PayloadError(f"byte 5: no selection has the number {selection}")
    for coder in CODERS:
        if (selection, kind) in coder.formats(False) | coder.formats(True):
            return coder
    raise PayloadError(f"byte 6: selection {selection} has no values of kind {kind}")


def _decode(
    reader: Reader, selection: int, flags: int, layout: Layout, coder: type[Coder]
) -> Decoded:
    if selection == CODED:
        return Decoded(layout.size, *coder.read_coded(reader, layout))
    indices = None
    if selection == SPARSE:
        indices = decode_positions(reader, layout)
    elif selection == SPARSE_CODED:
        ones = reader.take("u1", int(reader.take("<u4", 1)[0]))
        indices, levels = decode_integers(ones.data, layout)
        if (levels != 1).any():
            raise PayloadError("positions are coded as levels of 1, and one is another")
    count = layout.size if indices is None else len(indices)
    values = coder.decode(reader, flags, layout, count)
    reader.finish()
    return Decoded(layout.size, indices, values)


# --- small tensors dense --------------------------------------------------------------------------


def _pick(vector: Tensor, layout: Layout, chosen: np.ndarray) -> Tensor:
    """The entries of the chosen tensors, one after the other; chosen: bool [num_tensors]."""
    import torch

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


# --- finite numbers -------------------------------------------------------------------------------


def all_finite(vector: Tensor) -> bool:
    """A finite sum has only finite terms; only a sum that overflowed needs the second look."""
    return math.isfinite(vector.sum()) or bool(vector.isfinite().all())


def _finite(decoded: Decoded) -> Decoded:
    """What was decoded. Raises PayloadError if a value is infinite or NaN."""
    if not all_finite(_as_tensor(decoded.values)):
        raise PayloadError("it holds a value that is not finite")
    return decoded


def _as_tensor(array: np.ndarray) -> Tensor:
    """A tensor on the array's memory."""
    import torch

    return torch.from_numpy(array)
