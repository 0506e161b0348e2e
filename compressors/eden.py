"""EDEN: a random rotation, after which 1 to 4 bits a value go a long way.

Vargaftik et al. 2022, arXiv 2108.08842. Decoding is elementwise float32 in a fixed order, so that
all machines decode the same bits. docs/wire-format.md specifies every bit.
"""

import math

import numpy as np

from compiled import compiled, random_word
from wire.bits import pack_bits, unpack_bits
from wire.container import PayloadError, Reader

LARGEST = float(np.finfo(np.float32).max)
LARGEST_BLOCK, SMALLEST_BLOCK = 8192, 16
# The non-negative half of the Lloyd-Max quantiser's values for N(0, 1), by bits.
CENTROIDS = {
    1: (0.79788456,),
    2: (0.45278005, 1.5104176),
    3: (0.24509418, 0.75600522, 1.3439093, 2.1519457),
    4: (0.12839504, 0.3880483, 0.65675914, 0.94234043, 1.2562312, 1.6180464, 2.0690172, 2.7325895),
}


def centroids(bits: int) -> np.ndarray:
    """float32 [2^bits], ascending."""
    half = np.array(CENTROIDS[bits], np.float32)
    return np.concatenate((-half[::-1], half))


def blocks(count: int) -> np.ndarray:
    """The sizes of the blocks of `count` numbers, int64; fewer than SMALLEST_BLOCK remain."""
    powers = [1 << b for b in range(12, 3, -1)]
    tail = [power for power in powers if count % LARGEST_BLOCK & power]
    return np.array([LARGEST_BLOCK] * (count // LARGEST_BLOCK) + tail, np.int64)


@compiled
def _rotate(x, spare, size):
    """Multiply x[:size] by the Hadamard matrix of +1 and -1; returns (the product, the other).

    Butterflies of i and i + size / 2, then of i and i + size / 4, down to neighbours. Each stage
    writes its pairs side by side (Pease 1968), so that all of them read long runs of both halves.
    """
    half, stages = size // 2, size
    while stages > 1:
        for i in range(half):
            a, b = x[i], x[i + half]
            spare[2 * i], spare[2 * i + 1] = a + b, a - b
        x, spare = spare, x
        stages //= 2
    return x, spare


@compiled
def _flip(x, size, start, stage, seed):
    """Change signs by bit i % 64 of random number 2 * (i // 64) + stage, i counting from start."""
    for begin in range(0, size, 64):
        i = start + begin
        word = random_word(seed, np.uint64(2 * (i // 64) + stage)) >> np.uint64(i % 64)
        for j in range(min(64, size - begin)):
            sign = np.int32(word >> np.uint64(j) & np.uint64(1))
            x[begin + j] *= np.float32(1 - 2 * sign)


@compiled
def _eden(numbers, sizes, seed, centres, x, spare, indices, scales):
    """Rotate and quantise each block; numbers float32 [n], x and spare float32 [8192]."""
    start = 0
    for b in range(len(sizes)):
        size, square, product = sizes[b], 0.0, 0.0
        for j in range(start, start + size):
            square += np.float64(numbers[j]) * np.float64(numbers[j])
            indices[j] = 0
        norm = math.sqrt(square)
        unit = 1 / norm if norm > 0 else 0.0
        for j in range(size):
            x[j] = np.float32(numbers[start + j] * unit)
        for stage in range(2):
            _flip(x, size, start, stage, seed)
            x, spare = _rotate(x, spare, size)
        # The rotation is x / size; its coordinates have the deviation 1 / sqrt(size).
        for k in range(len(centres) - 1):
            limit = np.float32((centres[k] + centres[k + 1]) / 2 * math.sqrt(size))
            for j in range(size):
                indices[start + j] += x[j] > limit
        for j in range(size):
            product += np.float64(x[j]) * centres[indices[start + j]]
        scales[b] = min(norm / product, LARGEST) if norm > 0 else 0.0
        start += size


@compiled
def _eden_back(indices, sizes, seed, centres, scales, x, spare, out):
    """The reverse of _eden but for the quantiser, all in float32."""
    start = 0
    for b in range(len(sizes)):
        size = sizes[b]
        for j in range(size):
            x[j] = centres[indices[start + j]]
        for stage in range(1, -1, -1):
            x, spare = _rotate(x, spare, size)
            _flip(x, size, start, stage, seed)
        for j in range(size):
            out[start + j] = x[j] * scales[b]
        start += size


def write_eden(numbers: np.ndarray, bits: int, seed: int) -> bytes:
    """Seed, scales, packed indices, and as fp32 what is too short for the smallest block.

    Two rotations: after one, a vector of few large entries has a biased estimate at any length
    ((1, 1/2, 0, 0, ...) always arrives as (5/4, 0, 0, 0, ...) at 1 bit).
    """
    sizes = blocks(len(numbers))
    rotated = int(sizes.sum())
    indices, scales = np.empty(rotated, np.int16), np.empty(len(sizes), np.float32)
    seed &= 2**64 - 1
    centres = centroids(bits).astype(np.float64)
    _eden(numbers, sizes, np.uint64(seed), centres, *_room(), indices, scales)
    tail = numbers[rotated:].astype("<f4").tobytes()
    head = seed.to_bytes(8, "little") + scales.astype("<f4").tobytes()
    return head + pack_bits(indices, bits) + tail


def _room() -> tuple[np.ndarray, np.ndarray]:
    return np.empty(LARGEST_BLOCK, np.float32), np.empty(LARGEST_BLOCK, np.float32)


def read_eden(reader: Reader, bits: int, count: int) -> np.ndarray:
    sizes = blocks(count)
    rotated = int(sizes.sum())
    seed, scales = reader.take("<u8", 1)[0], reader.take("<f4", len(sizes))
    if not np.isfinite(scales).all():
        raise PayloadError("a scale is not finite")
    indices = unpack_bits(reader, rotated, bits)
    out = np.empty(count, np.float32)
    _eden_back(indices, sizes, seed, centroids(bits), scales, *_room(), out)
    if np.isinf(out[:rotated]).any():
        np.clip(out[:rotated], -LARGEST, LARGEST, out=out[:rotated])
    out[rotated:] = reader.take("<f4", count - rotated)
    return out


def packed_size(bits: int, count: int) -> int:
    """The bytes that write_eden() makes of `count` numbers."""
    sizes = blocks(count)
    rotated = int(sizes.sum())
    return 8 + 4 * len(sizes) + -(-rotated * bits // 8) + 4 * (count - rotated)
