"""eden(R): R bits a value, less than one. After a random rotation only the largest values travel.

EDEN (Vargaftik et al. 2022, arXiv 2108.08842) with a quantiser that says +1, -1 or mostly 0. A
rotated vector looks as if drawn from a normal distribution, so few values above a threshold hold
much of it: of all unbiased estimates at so few bits it needs a third less than one that sends the
signs of a random part. Decoding is elementwise float32 in a fixed order.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

from compiled import compiled, index, random_word
from compressors.coder import LARGEST, Coder, Words, read_integers
from compressors.eden import rotate_block, rotate_block_back
from layout import Layout
from wire.bits import pack_bits, unpack_bits
from wire.container import PayloadError, Reader
from wire.entropy import encode_integers
from wire.positions import decode_positions, encode_positions

BLOCK, LEAST_HALF, LEAST_BLOCK = 32768, 1024, 16
RICE, INTEGERS = 0, 1  # how positions and signs are written
SIXTHS = (1.0, 1.122462, 1.2599211, 1.4142135, 1.587401, 1.7817974)  # 2^(k / 6)
DITHER = 1 << 32  # the random words from here on round the scales


class Rotated(Coder):
    """Each tensor is multiplied by its size^(1/6) before the rotation, and divided by it at last.

    Within a block the error spreads evenly. The values of small tensors are the larger ones, about
    in proportion to size^(-1/3), and factors of the square root of that make the error least.
    """

    words = Words("eden({})", 0.001, 1.0)
    kind = 9
    ruins_models = True
    takes_selection = False

    @property
    def variance(self) -> float:
        threshold = threshold_of(self.number)
        tail = 2 * NormalDist().cdf(-threshold)
        centroid = 2 * NormalDist().pdf(threshold) / tail  # the mean magnitude beyond it
        return 1 / (tail * centroid**2) - 1

    def write(self, values: np.ndarray, layout: Layout, seed: int) -> bytes:
        """Seed, scales as bf16, then positions and signs in the shorter of two codes."""
        sizes, seed = blocks(len(values)), seed & 2**64 - 1
        size, scales = int(sizes.sum()), np.empty(len(sizes), np.float32)
        padded = _with_gains(values, layout, size)
        indices, signs = np.empty(size, np.int64), np.empty(size, np.int16)
        written, thresholds = (indices, signs, scales), _thresholds(padded, sizes, self.number)
        count = _rotate_and_mark(padded, sizes, np.uint64(seed), thresholds, *_room(), *written)
        indices, signs, one = indices[:count], signs[:count], _rotated_layout(size)
        rice = encode_positions(indices, one) + pack_bits(signs < 0, 1)
        integers = encode_integers(indices, signs, one)
        code = bytes([RICE]) + rice if len(rice) <= len(integers) else bytes([INTEGERS]) + integers
        return seed.to_bytes(8, "little") + _rounded(scales, seed).tobytes() + code

    @classmethod
    def read(cls, reader: Reader, layout: Layout, count: int) -> np.ndarray:
        sizes = blocks(count)
        size = int(sizes.sum())
        seed, scales = reader.take("<u8", 1)[0], reader.take("<u2", len(sizes))
        scales = (scales.astype(np.uint32) << 16).view(np.float32)
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise PayloadError("a scale is negative or not finite")
        marks = _read_marks(reader, size)
        out = np.empty(size, np.float32)
        _rotate_back(marks, sizes, seed, scales, *_room(), out)
        for tensor, gain in _tensors(out, layout):
            np.divide(tensor, gain, out=tensor)
        return out[:count]


def threshold_of(bits: np.ndarray | float) -> np.ndarray | float:
    """The magnitude, in standard deviations, above which a value travels at so many bits each."""
    thresholds, entropies = _entropies()
    return np.interp(bits, entropies, thresholds)


@functools.cache
def _entropies() -> tuple[np.ndarray, np.ndarray]:
    """Thresholds, descending, and the bits for whether a normal value is beyond, and its sign."""
    thresholds = np.arange(6, 0.9, -0.001)
    p = np.array([math.erfc(threshold / math.sqrt(2)) for threshold in thresholds])
    return thresholds, p - p * np.log2(p) - (1 - p) * np.log2(1 - p)


def _thresholds(values: np.ndarray, sizes: np.ndarray, bits: float) -> np.ndarray:
    """Each block's threshold, float64, where a value takes `bits` on average.

    The error of a block is about in proportion to its energy / its bits. The sum is least if the
    bits of a value are in proportion to the root mean square of its block (Neyman 1934), up to one.
    """
    parts = np.split(values, np.cumsum(sizes)[:-1]) if len(sizes) else []
    rates = np.sqrt(np.array([_energy(part) for part in parts]) / sizes)
    rates /= max(rates.max(initial=0), np.finfo(float).tiny)
    for _ in range(20):  # what a block with one bit cannot take, the others get
        mean = (rates * sizes).sum() / max(sizes.sum(), 1)
        rates = np.minimum(1.0, rates * (bits / mean)) if mean > 0 else rates
    return threshold_of(rates)


def _energy(block: np.ndarray) -> float:
    """The sum of the squares, float64. reduceat() adds in another order than sum()."""
    return np.add.reduceat(np.square(block, dtype=float), [0])[0]


def blocks(count: int) -> np.ndarray:
    """The sizes of the blocks of `count` numbers, int64: powers of two; the last may be padded."""
    sizes, rest = [BLOCK] * (count // BLOCK), count % BLOCK
    power = BLOCK // 2
    while power >= LEAST_HALF:
        if rest >= power:
            sizes.append(power)
            rest -= power
        power //= 2
    if rest:
        sizes.append(max(LEAST_BLOCK, 1 << (rest - 1).bit_length()))
    return np.array(sizes, np.int64)


def _tensors(vector: np.ndarray, layout: Layout) -> Iterator[tuple[np.ndarray, np.float32]]:
    """Yield the part of a vector that is a tensor, and its gain: about its size^(1/6).

    It is a product from a table and a power of two, so that all machines have the same.
    """
    for start, stop in itertools.pairwise(layout.offsets.tolist()):
        digits = (stop - start).bit_length()
        yield vector[start:stop], np.float32(SIXTHS[digits % 6] * 2.0 ** (digits // 6))


def _with_gains(values: np.ndarray, layout: Layout, size: int) -> np.ndarray:
    """Each tensor times its gain, then zeros up to `size`; float32 [size]."""
    padded = np.zeros(size, np.float32)
    pairs = zip(_tensors(values, layout), _tensors(padded, layout), strict=True)
    for (tensor, gain), (product, _) in pairs:
        most = np.float32(LARGEST / 2) / gain  # the product stays finite
        np.clip(tensor, -most, most, out=product)
        product *= gain
    return padded


def _rotated_layout(size: int) -> Layout:
    return Layout(("rotated",), ((size,),))


def _room() -> tuple[np.ndarray, np.ndarray]:
    """Memory for a block and its rotation."""
    return np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)


def _rounded(scales: np.ndarray, seed: int) -> np.ndarray:
    """The scales as bf16, <u2 [n], rounded up or down at random, so that their mean is right."""
    words = [random_word(np.uint64(seed), np.uint64(DITHER + b)) for b in range(len(scales))]
    dither = np.array(words, np.uint64) & np.uint64(0xFFFF)
    return ((scales.view(np.uint32) + dither) >> np.uint64(16)).astype("<u2")


def _read_marks(reader: Reader, size: int) -> np.ndarray:
    """What each of the rotated values is, int8 [size]: 1, -1 or 0. Raises PayloadError."""
    code, one = int(reader.take("u1", 1)[0]), _rotated_layout(size)
    marks = np.zeros(size, np.int8)
    if code == RICE:
        indices = decode_positions(reader, one)
        marks[indices] = 1 - 2 * unpack_bits(reader, len(indices), 1)
    elif code == INTEGERS:
        indices, signs = read_integers(reader.rest(), one, size, largest=1)
        marks[indices] = signs
    else:
        raise PayloadError(f"marks are written in code {code}, which there is not")
    return marks


@compiled
def _rotate_and_mark(values, sizes, seed, thresholds, x, spare, indices, signs, scales):
    """Rotate each block; mark what is beyond the threshold, or else the largest.

    values: float32 [n]; x and spare: float32, of the largest block's size. Returns how many are
    marked: so many of indices, int64 [n], and of signs, int16 [n] of +1 and -1, are written.
    """
    start, count = np.int64(0), 0  # a literal start would compile what takes it a second time
    for b in range(len(sizes)):
        end = start + sizes[b]
        norm, x, spare = rotate_block(values[start:end], start, x, spare, seed)
        block, first = x[: sizes[b]], count
        limit = min(np.float32(thresholds[b] * math.sqrt(sizes[b])), _largest(block))
        for j in range(len(block)):  # without a branch: the next one overwrites what is not marked
            sign = np.int16(block[j] >= limit) - np.int16(block[j] <= -limit)
            indices[index(count)], signs[index(count)] = start + j, sign
            count += sign != 0
        total = 0.0
        for k in range(first, count):
            total += np.float64(abs(block[index(indices[index(k)] - start)]))
        scales[b] = min(norm / total, LARGEST / 2) if norm > 0 else 0.0
        start = end
    return count


@compiled
def _largest(block):
    """The largest magnitude. Magnitudes compare as their bits do, and integers with vectors."""
    bits, largest = block.view(np.int32), 0
    for j in range(len(bits)):
        largest = max(largest, bits[j] & 0x7FFFFFFF)
    return np.int32(largest).view(np.float32)


@compiled
def _rotate_back(marks, sizes, seed, scales, x, spare, out):
    """The reverse of _rotate_and_mark but for what was not marked, all in float32.

    marks: int8 [n], each +1, -1 or 0.
    """
    start = np.int64(0)  # a literal 0 would compile what takes it a second time
    for b in range(len(sizes)):
        end = start + sizes[b]
        block = marks[start:end]
        for j in range(len(block)):
            x[j] = block[j]
        rotate_block_back(x, spare, start, seed, scales[b], out[start:end])
        start = end
