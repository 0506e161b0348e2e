"""Codecs: from a vector to the bytes of a message and back.

encode() returns the payload and what the receiver will decode from it, so that a caller knows
exactly what was lost: vector == sent + residual (error feedback, Seide et al. 2014; Karimireddy
et al. 2019, arXiv 1901.09847). What to select and how to write values compose freely. Positions are
selected on the vector's device; only what was selected goes to the CPU, where it is coded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compiled import add_at
from compressors.bounded import Bounded
from compressors.coder import (
    CODED,
    COMPRESSED,
    SMALL_DENSE,
    SPARSE_CODED,
    Body,
    Coder,
    read_positions,
)
from compressors.composition import composition
from compressors.eden import Eden
from compressors.linear import Linear
from compressors.means import Means
from compressors.plain import Bf16, Fp16, Fp32
from compressors.powersgd import PowerSgd
from compressors.qsgd import Qsgd
from compressors.rotated import Rotated
from compressors.sign import Sign
from compressors.ternary import Ternary
from layout import Layout
from wire.container import (
    CHECKSUM,
    OVERHEAD,
    Memory,
    PayloadError,
    PayloadMemory,
    Reader,
    new_memory,
    pack,
    unpack,
)
from wire.positions import pack_positions, unpack_positions

__all__ = [
    "CODERS",
    "OVERHEAD",
    "Coder",
    "Decoded",
    "Memory",
    "NotFinite",
    "PayloadMemory",
    "PayloadError",
    "all_finite",
    "composition",
    "decode",
    "encode",
    "new_memory",
    "pack_positions",
    "parse_coder",
    "to_device",
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
    Means,
    Sign,
    Eden,
    Rotated,
    Bounded,
    PowerSgd,
]

Select = Callable[[Tensor, Layout], np.ndarray | Tensor]

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
    """A vector as it arrives: values at indices, zero elsewhere.

    It is decoded on the CPU, where its parts are arrays; on another device they are tensors. One
    part may be there and the other not yet: to() moves what is not.
    """

    size: int
    indices: np.ndarray | Tensor | None  # int64 [n], ascending; None means that all values travel
    values: np.ndarray | Tensor  # float32 [n]

    def to(self, device: torch.device) -> Decoded:
        """The same on a device. It is there when this returns."""
        if device.type == "cpu":
            return self
        indices, values = (
            to_device(part, device) if isinstance(part, np.ndarray) else part
            for part in (self.indices, self.values)
        )
        return Decoded(self.size, indices, values)

    def add_to(self, vector: Tensor, weight: float = 1.0) -> None:
        """vector += weight * self, in place; vector: float32 [size], on the device of self."""
        if self.indices is None:
            vector.add_(torch.as_tensor(self.values), alpha=weight)
        elif isinstance(self.values, np.ndarray):
            add_at(vector.numpy(), self.indices, self.values, np.float32(weight))
        else:  # no index stands twice, so that every sum has two terms
            moved = vector.index_select(0, self.indices).add_(self.values, alpha=weight)
            vector.index_copy_(0, self.indices, moved)

    def dense(self, copy: bool = True) -> Tensor:
        """The whole vector, float32 [size]; without a copy it may lie in the payload: read only."""
        values = torch.as_tensor(self.values)
        if self.indices is None and not copy:
            return values
        vector = torch.zeros(self.size, device=values.device)
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

    The vector may be on any device. values: a coder, or a word that parse_coder() reads. select:
    returns the ascending int64 positions to send of the vector that it is given, as an array of the
    CPU or on the vector's device; those whose values would arrive as zero are not sent.
    dense_below: tensors of fewer entries travel whole, as fp32. seed: of the random choices of
    qsgd, eden and powersgd. memory: gives the bytes that the payload is written on.
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
        if isinstance(coder, Fp32) and select is None and vector.device.type != "cpu":
            return payload, Decoded(layout.size, None, vector.clone())  # it is there already
        return payload, _read_back(payload, body, layout, coder)
    rest = layout.where(large)
    body = _encode(_pick(vector, layout, large), rest, coder, select, seed)
    small = to_host(_pick(vector, layout, ~large)).numpy().astype("<f4")
    head = dense_below.to_bytes(4, "little") + small.tobytes()
    parts, flags = (head, body.positions, body.values), body.flags | SMALL_DENSE
    payload = pack(body.selection, body.kind, layout, *parts, flags=flags, memory=memory)
    return payload, _joined(layout, large, small, _read_back(payload, body, rest, coder))


def decode(
    payload: bytes | memoryview,
    layout: Layout,
    values: str | Coder | None = None,
    selected: int | None = None,
    dense_below: int = 0,
) -> Decoded:
    """Decode a stranger's bytes. Raises PayloadError, never anything else.

    values: the coder that both ends agreed on, or its word; selected: how many positions the sender
    may select at most, None if it may not; dense_below: as in encode(). What was not agreed on is
    refused before it costs any work. If `values` is None, any payload for the layout is decoded.
    """
    selection, kind, flags, body = unpack(payload, layout)
    if values is None:
        coder, most = _any_coder(selection, kind), layout.size
    else:
        coder = parse_coder(values) if isinstance(values, str) else values
        most = layout.size if selected is None else selected
        if (selection, kind) not in coder.formats(selected is not None):
            raise PayloadError(f"byte 5: selection {selection}, kind {kind}: not {coder} as agreed")
    may_be_compressed = coder.compressible and selection != CODED
    if flags & COMPRESSED and not may_be_compressed or flags > 3:
        raise PayloadError(f"byte 7: flags {flags} with selection {selection} and kind {kind}")
    reader = Reader(body)
    limit = int(reader.take("<u4", 1)[0]) if flags & SMALL_DENSE else 0
    due = dense_below if (layout.sizes < dense_below).any() else 0
    if values is not None and limit != due:
        raise PayloadError(f"tensors of under {limit} entries are apart, not {due} as agreed")
    large = layout.sizes >= limit
    if not flags & SMALL_DENSE:
        return _finite(_decode(reader, selection, flags, layout, coder, most))
    small = reader.take("<f4", int(layout.sizes[~large].sum()))
    rest = layout.where(large)
    joined = _joined(layout, large, small, _decode(reader, selection, flags, rest, coder, most))
    return _finite(joined)


# --- one body -------------------------------------------------------------------------------------


def _encode(vector: Tensor, layout: Layout, coder: Coder, select: Select | None, seed: int) -> Body:
    indices = None
    if select is not None:
        positions = torch.as_tensor(select(vector, layout), device=vector.device)
        vector = vector.index_select(0, positions)
        indices = to_host(positions).numpy()
    return coder.encode(to_host(vector).numpy(), indices, layout, seed)


def _read_back(payload: memoryview, body: Body, layout: Layout, coder: Coder) -> Decoded:
    """What was sent, read from the payload: it stays as it is if the vector changes later."""
    values = body.arrives
    if values is None:
        end = len(payload) - CHECKSUM.size
        reader = Reader(payload[end - len(body.values) : end])
        count = layout.size if body.indices is None else len(body.indices)
        values = coder.decode(reader, body.flags, layout, count)
    return Decoded(layout.size, body.indices, values)


def _any_coder(selection: int, kind: int) -> Coder:
    """A coder that reads all payloads with these bytes. Raises PayloadError if there is none."""
    if selection > SPARSE_CODED:
        raise PayloadError(f"byte 5: no selection has the number {selection}")
    for coder in CODERS:
        if (selection, kind) in coder.formats(False) | coder.formats(True):
            return coder(number=None)
    raise PayloadError(f"byte 6: selection {selection} has no values of kind {kind}")


def _decode(
    reader: Reader, selection: int, flags: int, layout: Layout, coder: Coder, most: int
) -> Decoded:
    """The vector in a body, which may hold `most` positions. Raises PayloadError."""
    if selection == CODED:  # which only levels are
        return Decoded(layout.size, *coder.read_coded(reader, layout, most))
    indices = read_positions(reader, selection, layout, most)
    count = layout.size if indices is None else len(indices)
    values = coder.decode(reader, flags, layout, count)
    reader.finish()
    return Decoded(layout.size, indices, values)


# --- small tensors dense --------------------------------------------------------------------------


def _pick(vector: Tensor, layout: Layout, chosen: np.ndarray) -> Tensor:
    """The entries of the chosen tensors, one after the other; chosen: bool [num_tensors]."""
    tensors = vector.split(layout.sizes.tolist())
    picked = [tensor for tensor, is_chosen in zip(tensors, chosen, strict=True) if is_chosen]
    return torch.cat([vector[:0], *picked])


def _joined(layout: Layout, large: np.ndarray, small: np.ndarray, rest: Decoded) -> Decoded:
    """The vector of which `small` holds the small tensors and `rest` the large ones."""
    values, small_sizes = rest.values, layout.sizes[~large]
    if rest.indices is None:
        values = _in_turn(large, values, layout.sizes[large], small, small_sizes)
        return Decoded(layout.size, None, values)
    # A payload may hold all positions: they take little room while the values are joined.
    coded = rest.indices.astype(np.min_scalar_type(layout.size))
    del rest
    starts = np.cumsum(layout.sizes[large]) - layout.sizes[large]
    counts = np.diff(np.searchsorted(coded, starts.astype(coded.dtype)), append=len(coded))
    coded += np.repeat((layout.offsets[:-1][large] - starts).astype(coded.dtype), counts)
    spans = zip(layout.offsets[:-1][~large], layout.offsets[1:][~large], strict=True)
    places = np.concatenate([coded[:0], *(np.arange(*span, dtype=coded.dtype) for span in spans)])
    values = _in_turn(large, values, counts, small, small_sizes)
    indices = _in_turn(large, coded, counts, places, small_sizes, np.int64)
    return Decoded(layout.size, indices, values)


def _in_turn(
    large: np.ndarray,
    of_large: np.ndarray,
    large_counts: np.ndarray,
    of_small: np.ndarray,
    small_counts: np.ndarray,
    dtype: type = np.float32,
) -> np.ndarray:
    """What belongs to each tensor, in the order of the layout: so much to each large and small."""
    tensors = {True: (of_large, large_counts), False: (of_small, small_counts)}
    tensors = {key: iter(np.split(all_of, np.cumsum(n))) for key, (all_of, n) in tensors.items()}
    in_turn = [next(tensors[is_large]) for is_large in large.tolist()]
    return np.concatenate([of_large[:0], *in_turn], dtype=dtype)


# --- finite numbers -------------------------------------------------------------------------------


def all_finite(vector: Tensor) -> bool:
    """Whether float32 [n] holds neither inf nor NaN.

    A finite sum has only finite terms; only one that overflowed needs the second look.
    """
    return math.isfinite(vector.sum()) or all(map(math.isfinite, vector.aminmax()))


def _finite(decoded: Decoded) -> Decoded:
    """What was decoded. Raises PayloadError if a value is infinite or NaN."""
    if not all_finite(torch.as_tensor(decoded.values)):
        raise PayloadError("it holds a value that is not finite")
    return decoded


# --- between the device of training and the CPU ---------------------------------------------------
# A GPU copies from and to page-locked memory at fifty times the speed of other memory. Both
# functions wait for the copy alone: work that other threads have queued on the device goes on.


def to_host(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; itself if it is there."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on a device."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    copied = tensor.pin_memory().to(device, non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    copied.record_stream(torch.cuda.default_stream(device))  # where the server will read it
    return copied
