"""Values as integers times scales: what the coders that make integers share.

A reader computes what arrives by elementwise float operations in a fixed order only, so that all
machines decode the same bits. Nothing overflows: what would, becomes the largest float32.
"""

import numpy as np

from compiled import compiled
from compressors.coder import CODED, DENSE, Body, Packed, read_integers, with_bits
from layout import Layout
from wire.bits import pack_bits, unpack_bits
from wire.container import PayloadError, Reader
from wire.entropy import MAX_LEVEL, encode_integers

SMALLEST = np.float32(2.0**-149)
WORTH_CODING = 1 / 8  # of levels that are not zero: beyond it, packed ones are shorter or nearly so

# To the nearest level: with fewer steps, rounding lengthens vectors of normal numbers by over 5%.
ENOUGH_STEPS = 15


class Levels(Packed):
    """Levels with one scale: packed, or those that are not zero in an entropy code.

    A coder says how it makes levels, and one with several scales what each of them is for.
    """

    kind = coded_kind = 3
    most_bits = 16

    @property
    def steps(self) -> int:
        """The level of the largest magnitude."""
        return 2 ** (self.number - 1) - 1

    @property
    def largest_level(self) -> int:
        """No level of its payloads is larger in magnitude."""
        return self.steps

    def quantise(self, values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n] as (levels int16 [n], scales float32 [num_scales])."""
        raise NotImplementedError

    def bits_of(self, levels: np.ndarray) -> int:
        """The bits in which a level is packed."""
        return self.number

    @classmethod
    def counts(cls, layout: Layout, count: int) -> np.ndarray:
        """How many of `count` values belong to each scale, int64 [num_scales]."""
        return np.array([count])

    def encode(self, values, indices, layout, seed) -> Body:
        levels, scales = self.quantise(values, seed)
        if indices is not None:
            return self.coded(indices, levels, scales, layout)
        packed = self.packed(levels, scales)
        if np.count_nonzero(levels) > WORTH_CODING * len(levels):
            return packed
        coded = self.coded(np.arange(len(levels)), levels, scales, layout)
        return coded if len(coded) < len(packed) else packed

    @classmethod
    def formats(cls, selected: bool) -> set[tuple[int, int]]:
        coded = {(CODED, cls.coded_kind)}
        return coded if selected else coded | {(DENSE, cls.kind)}

    # --- packed: every level in as many bits; 1 bit stands for a sign, more are in two's complement

    def packed(self, levels: np.ndarray, scales: np.ndarray) -> Body:
        bits = self.bits_of(levels)
        fields = pack_bits(levels < 0 if bits == 1 else levels, bits)
        values, flags = with_bits(bits, scales.astype("<f4").tobytes() + fields)
        return Body(DENSE, self.kind, b"", values, flags)

    @classmethod
    def packet_size(cls, bits: int, layout: Layout, count: int) -> int:
        return 4 * len(cls.counts(layout, count)) + -(-count * bits // 8)

    @classmethod
    def read_packet(cls, reader: Reader, bits: int, layout: Layout, count: int) -> np.ndarray:
        counts = cls.counts(layout, count)
        scales = reader.take("<f4", len(counts))
        levels = unpack_bits(reader, count, bits)
        if bits == 1:
            levels *= -2
            levels += 1
        else:
            levels <<= 16 - bits
            levels >>= 16 - bits
        return times(levels, scales, counts)

    # --- coded: the levels that are not zero, with their positions

    def coded(self, indices, levels, scales, layout) -> Body:
        kept = np.flatnonzero(levels if scales.any() else np.zeros(0))
        head, counts = self.head(scales, kept)
        indices, levels = indices[kept], levels[kept]
        code = encode_integers(indices, levels, layout)
        arrives = times(levels, scales, counts)
        return Body(CODED, self.coded_kind, head, code, indices=indices, arrives=arrives)

    def head(self, scales: np.ndarray, kept: np.ndarray) -> tuple[bytes, np.ndarray]:
        """What precedes the code, and how many of the kept levels have each scale, int64.

        kept: the places of the levels that are not zero, int64, ascending.
        """
        return scales.astype("<f4").tobytes(), np.array([len(kept)])

    def read_coded(
        self, reader: Reader, layout: Layout, most: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(indices int64 [n], ascending, values float32 [n]), n <= most. Raises PayloadError."""
        scales, counts = self.read_head(reader, layout)
        indices, levels = self.read_levels(reader.rest(), layout, most)
        counts = np.array([len(levels)]) if counts is None else counts
        if counts.sum() != len(levels):
            raise PayloadError(f"buckets of {counts.sum()} levels in all hold {len(levels)}")
        return indices, times(levels, scales, counts)

    def read_head(self, reader: Reader, layout: Layout) -> tuple[np.ndarray, np.ndarray | None]:
        """What head() wrote: the scales, and how many levels have each; None: all have the one."""
        return reader.take("<f4", 1), None

    def read_levels(
        self, code: memoryview, layout: Layout, most: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(indices int64 [n], ascending, levels int16 [n]), n <= most. Raises PayloadError."""
        largest = MAX_LEVEL if self.number is None else self.largest_level
        return read_integers(code, layout, most, largest)


# --- levels and scales ----------------------------------------------------------------------------


@compiled
def _times(levels, scales, counts, out):
    i = 0
    for s in range(len(scales)):
        for _ in range(counts[s]):
            out[i] = np.float32(levels[i]) * scales[s]
            i += 1


def times(levels: np.ndarray, scales: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """levels * scales, float32 [n]; the first counts[0] levels have the first scale, and so on.

    A caller that reads a stranger's scales refuses what is not finite.
    """
    out = np.empty(len(levels), np.float32)
    _times(levels, np.array(scales, np.float32), counts, out)
    return out


def rounded(
    values: np.ndarray, sizes: np.ndarray, steps: int, largest_level: int
) -> tuple[np.ndarray, np.ndarray]:
    """(levels [n], scales [num_tensors]): round(v / scale), with scale = max abs(v) / steps.

    sizes: the number of values of each tensor, int64 [num_tensors].
    """
    filled = sizes > 0
    largest = np.zeros(len(sizes))
    if filled.any():
        starts = np.cumsum(sizes) - sizes
        largest[filled] = np.maximum.reduceat(np.abs(values), starts[filled])
    scales = scales_of(largest, steps)
    divisors = np.where(scales > 0, scales, np.float32(1))
    levels = values / (divisors if len(sizes) == 1 else np.repeat(divisors, sizes))
    levels = np.clip(np.rint(levels, out=levels), -largest_level, largest_level, out=levels)
    return levels.astype(np.int16), scales


def scales_of(largest: np.ndarray, steps: int) -> np.ndarray:
    """largest / steps in float32 [n], rounded down so that steps * scale cannot overflow."""
    scales = (largest / steps).astype(np.float32)
    too_large = scales.astype(np.float64) * steps > largest
    scales[too_large] = np.nextafter(scales[too_large], np.float32(0))
    return np.where((largest > 0) & (scales == 0), SMALLEST, scales)


def mean_magnitude(values: np.ndarray, count: int) -> np.ndarray:
    """The one scale of signs, float32 [1]: the magnitudes' sum / count."""
    return np.array([np.abs(values).sum(dtype=np.float64) / max(count, 1)], np.float32)
