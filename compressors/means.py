"""means2..means4: each value as its sign and the mean of the magnitudes that are like its own.

The 2-bit values of SparseLoCo (Sarfi et al. 2025, arXiv 2508.15706), for few selected values and
error feedback: a tensor has a table of its own with what each of its levels stands for.
"""

import numpy as np

from compiled import compiled
from compressors.coder import CODED, DENSE, Body, Packed, Words, read_integers, with_bits
from layout import Layout
from wire.bits import pack_bits, unpack_bits
from wire.container import PayloadError, Reader
from wire.entropy import encode_integers


class Means(Packed):
    """A tensor's magnitudes are split at their mean, both parts at theirs, into 2^(bits - 1) parts.

    Level l stands for the mean of part l, level -l for minus that. The authors' code has buckets of
    equal width about the mean of the values, which puts small values of both signs into one.
    Splitting loses nothing more, so of n values d is at least that of sign: 1 / n.
    """

    words = Words("means{}", 2, 4)
    kind = 8
    most_bits = 4
    contractive, keeps_norms = True, True

    @property
    def ruins_models(self) -> bool:
        return self.number < 4

    def encode(self, values, indices, layout, seed) -> Body:
        sizes = layout.sizes if indices is None else _num_in_tensors(indices, layout)
        num_parts = 2 ** (self.number - 1)
        levels = np.zeros(len(values), np.int16)
        tables = np.empty((np.count_nonzero(sizes), num_parts), np.float32)
        room = np.empty((2, num_parts))
        _split(values, sizes[sizes > 0], self.number - 1, levels, tables, room)
        if indices is None:
            fields = pack_bits(levels - (levels > 0), self.number)
            written, flags = with_bits(self.number, tables.astype("<f4").tobytes() + fields)
            return Body(DENSE, self.kind, b"", written, flags)
        arrives = _look_up(levels, tables, sizes[sizes > 0])
        kept = np.flatnonzero(arrives)
        indices, levels, arrives = indices[kept], levels[kept], arrives[kept]
        tables = tables[_num_in_tensors(indices, layout)[sizes > 0] > 0]
        head = bytes([self.number]) + len(tables).to_bytes(4, "little")
        head += tables.astype("<f4").tobytes()
        code = encode_integers(indices, levels, layout)
        return Body(CODED, self.kind, head, code, indices=indices, arrives=arrives)

    @classmethod
    def formats(cls, selected: bool) -> set[tuple[int, int]]:
        return {(CODED if selected else DENSE, cls.kind)}

    @classmethod
    def packet_size(cls, bits: int, layout: Layout, count: int) -> int:
        return (4 * np.count_nonzero(layout.sizes) << bits - 1) + -(-count * bits // 8)

    @classmethod
    def read_packet(cls, reader: Reader, bits: int, layout: Layout, count: int) -> np.ndarray:
        sizes = layout.sizes[layout.sizes > 0]
        tables = reader.take("<f4", len(sizes) << bits - 1).reshape(len(sizes), 1 << bits - 1)
        levels = unpack_bits(reader, count, bits)
        levels <<= 16 - bits
        levels >>= 16 - bits
        levels += levels >= 0
        return _look_up(levels, tables, sizes)

    def read_coded(
        self, reader: Reader, layout: Layout, most: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(indices int64 [n], ascending, values float32 [n]), n <= most. Raises PayloadError."""
        tables = self.read_head(reader, layout)
        indices, levels = read_integers(reader.rest(), layout, most, tables.shape[1])
        sizes = _num_in_tensors(indices, layout)
        if np.count_nonzero(sizes) != len(tables):
            raise PayloadError(f"{len(tables)} tables for {np.count_nonzero(sizes)} tensors")
        return indices, _look_up(levels, tables, sizes[sizes > 0])

    def read_head(self, reader: Reader, layout: Layout) -> np.ndarray:
        """The tables before coded levels, float32 [num_tables, num_parts]. Raises PayloadError."""
        bits, num_tables = self.read_bits(reader), int(reader.take("<u4", 1)[0])
        if num_tables > np.count_nonzero(layout.sizes):
            raise PayloadError(f"{num_tables} tables are more than there are tensors")
        return reader.take("<f4", num_tables << bits - 1).reshape(num_tables, 1 << bits - 1)

    def read_levels(
        self, code: memoryview, layout: Layout, most: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(indices int64 [n], ascending, levels int16 [n]), n <= most. Raises PayloadError."""
        return read_integers(code, layout, most, 1 << self.number - 1)


def _num_in_tensors(indices: np.ndarray, layout: Layout) -> np.ndarray:
    """How many of the ascending positions lie in each tensor, int64 [num_tensors]."""
    return np.diff(np.searchsorted(indices, layout.offsets))


def _look_up(levels: np.ndarray, tables: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """What levels stand for, float32 [n]; the first sizes[0] of them look into tables[0], etc."""
    out = np.empty(len(levels), np.float32)
    _fill(levels, np.array(tables, np.float32), sizes, out)
    return out


@compiled
def _fill(levels, tables, sizes, out):
    i = 0
    for t in range(len(sizes)):
        for _ in range(sizes[t]):
            mean = tables[t, abs(levels[i]) - 1]
            out[i] = mean if levels[i] > 0 else -mean
            i += 1


@compiled
def _split(values, sizes, num_splits, levels, tables, room):
    """Write the level of each value, and the mean of each part of each tensor; 0 of an empty one.

    The first sizes[0] values belong to tables[0], and so on. levels: zeros, in which the part of a
    value is found bit by bit; room: float64 [2, 2^num_splits], for each part its sum and its count.
    """
    start = 0
    for t in range(len(sizes)):
        stop = start + sizes[t]
        for split in range(num_splits + 1):
            for part in range(1 << split):
                room[0, part] = room[1, part] = 0.0
            for i in range(start, stop):
                room[0, levels[i]] += abs(np.float64(values[i]))
                room[1, levels[i]] += 1.0
            for part in range(1 << split):
                room[0, part] /= max(room[1, part], 1.0)
            for i in range(start, stop):
                part = levels[i]
                if split < num_splits:
                    levels[i] = 2 * part + (abs(np.float64(values[i])) > room[0, part])
                else:
                    levels[i] = -part - 1 if values[i] < 0 else part + 1
        for part in range(1 << num_splits):
            tables[t, part] = room[0, part]
        start = stop
