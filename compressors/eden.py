"""eden1..eden4: a random rotation, after which few bits a value go a long way.

EDEN (Vargaftik et al. 2022, arXiv 2108.08842). Decoding is elementwise float32 in a fixed order, so
that all machines decode the same bits.
"""

import math

import numpy as np

from compiled import compiled, index, random_word
from compressors.coder import LARGEST, Body, Packed, Words, in_order, with_bits
from layout import Layout
from wire.bits import pack_bits, unpack_bits
from wire.container import PayloadError, Reader

LARGEST_BLOCK, SMALLEST_BLOCK = 8192, 16
# The published relative error by bits, and as a variance, since the error is unbiased.
VARIANCES = {1: 0.571, 2: 0.133, 3: 0.0358, 4: 0.0096}
# The non-negative half of the Lloyd-Max quantiser's values for N(0, 1), by bits.
CENTROIDS = {
    1: (0.79788456,),
    2: (0.45278005, 1.5104176),
    3: (0.24509418, 0.75600522, 1.3439093, 2.1519457),
    4: (0.12839504, 0.3880483, 0.65675914, 0.94234043, 1.2562312, 1.6180464, 2.0690172, 2.7325895),
}


class Eden(Packed):
    """Blocks of up to 8192 values, each rotated twice; fewer than 16 at the end go as fp32.

    After one rotation, a vector of few large entries has a biased estimate at any length
    ((1, 1/2, 0, 0, ...) always arrives as (5/4, 0, 0, 0, ...) at 1 bit). After two, blocks of 16
    still have a bias of a few percent of the error, and a variance of up to twice `variance`;
    from 1024 values on, both are the paper's to about one percent.
    """

    words = Words("eden{}", 1, 4)
    kind = 6
    most_bits = 4

    @property
    def variance(self) -> float:
        return VARIANCES[self.number]

    @property
    def ruins_models(self) -> bool:
        return self.number == 1

    def encode(self, values, indices, layout, seed) -> Body:
        packet, flags = with_bits(self.number, self.write(values, layout, seed))
        return in_order(self.kind, packet, indices, layout, flags)

    def write(self, values: np.ndarray, layout: Layout, seed: int) -> bytes:
        """Seed, scales, packed indices, and as fp32 what is too short for the smallest block."""
        sizes = blocks(len(values))
        rotated = int(sizes.sum())
        indices, scales = np.empty(rotated, np.int16), np.empty(len(sizes), np.float32)
        seed &= 2**64 - 1
        centres = centroids(self.number).astype(np.float64)
        _eden(values, sizes, np.uint64(seed), centres, *_room(), indices, scales)
        tail = values[rotated:].astype("<f4").tobytes()
        head = seed.to_bytes(8, "little") + scales.astype("<f4").tobytes()
        return head + pack_bits(indices, self.number) + tail

    @classmethod
    def packet_size(cls, bits: int, layout: Layout, count: int) -> int:
        sizes = blocks(count)
        rotated = int(sizes.sum())
        return 8 + 4 * len(sizes) + -(-rotated * bits // 8) + 4 * (count - rotated)

    @classmethod
    def read_packet(cls, reader: Reader, bits: int, layout: Layout, count: int) -> np.ndarray:
        sizes = blocks(count)
        rotated = int(sizes.sum())
        seed, scales = reader.take("<u8", 1)[0], reader.take("<f4", len(sizes))
        if not np.isfinite(scales).all():
            raise PayloadError("a scale is not finite")
        indices = unpack_bits(reader, rotated, bits)
        out = np.empty(count, np.float32)
        _eden_back(indices, sizes, seed, centroids(bits), scales, *_room(), out)
        out[rotated:] = reader.take("<f4", count - rotated)
        return out


def centroids(bits: int) -> np.ndarray:
    """float32 [2^bits], ascending."""
    half = np.array(CENTROIDS[bits], np.float32)
    return np.concatenate((-half[::-1], half))


def blocks(count: int) -> np.ndarray:
    """The sizes of the blocks of `count` numbers, int64; fewer than SMALLEST_BLOCK remain."""
    powers = [1 << b for b in range(12, 3, -1)]
    tail = [power for power in powers if count % LARGEST_BLOCK & power]
    return np.array([LARGEST_BLOCK] * (count // LARGEST_BLOCK) + tail, np.int64)


def _room() -> tuple[np.ndarray, np.ndarray]:
    """Memory for a block and its rotation."""
    return np.empty(LARGEST_BLOCK, np.float32), np.empty(LARGEST_BLOCK, np.float32)


@compiled
def rotate(x, spare, size):
    """Multiply x[:size] by the Hadamard matrix of +1 and -1; returns (the product, the other).

    Butterflies of i and i + size / 2, then of i and i + size / 4, down to neighbours.
    """
    stages = size
    while stages > 1:
        if stages > 2:
            _two_stages(x, spare, size // 4)
            stages //= 4
        else:
            _one_stage(x, spare, size // 2)
            stages //= 2
        x, spare = spare, x
    return x, spare


@compiled
def _two_stages(x, out, quarter):
    """Write the results of each four values side by side (Pease 1968): all stages read long runs.

    It is apart from rotate(), whose arrays change places: LLVM vectorises no loop over such arrays.
    """
    for i in range(quarter):
        a, b, c, d = x[i], x[i + quarter], x[i + 2 * quarter], x[i + 3 * quarter]
        a, b, c, d = a + c, b + d, a - c, b - d
        k = 4 * i
        out[k], out[k + 1], out[k + 2], out[k + 3] = a + b, a - b, c + d, c - d


@compiled
def _one_stage(x, out, half):
    """The same for pairs."""
    for i in range(half):
        a, b = x[i], x[i + half]
        out[2 * i], out[2 * i + 1] = a + b, a - b


@compiled
def flip(x, size, start, stage, seed):
    """Change signs by bit i % 64 of random number 2 * (i // 64) + stage, i counting from start.

    x has room for a multiple of 64 values: what lies behind a smaller block may change as well.
    LLVM vectorises a loop over 32 bits, as the values have, with a number of steps that it knows.
    """
    bits = x.view(np.uint32)
    for begin in range(0, size, 64):
        i = start + begin
        word = random_word(seed, np.uint64(2 * (i // 64) + stage)) >> np.uint64(i % 64)
        low, high = np.uint32(word & np.uint64(0xFFFFFFFF)), np.uint32(word >> np.uint64(32))
        for j in range(32):
            bits[index(begin + j)] ^= (low >> np.uint32(j)) << np.uint32(31)
            bits[index(begin + j + 32)] ^= (high >> np.uint32(j)) << np.uint32(31)


@compiled
def rotate_block(values, start, x, spare, seed):
    """Rotate a block, which begins at `start`, at unit norm; returns (its norm, the result, spare).

    The result is the rotation times size: its coordinates have the deviation sqrt(size).
    """
    size, square = len(values), 0.0
    for j in range(size):
        square += np.float64(values[j]) * np.float64(values[j])
    norm = math.sqrt(square)
    unit = 1 / norm if norm > 0 else 0.0
    for j in range(size):
        x[j] = np.float32(values[j] * unit)
    for stage in range(2):
        flip(x, size, start, stage, seed)
        x, spare = rotate(x, spare, size)
    return norm, x, spare


@compiled
def rotate_block_back(x, spare, start, seed, scale, out):
    """Write the reverse of rotate_block, times scale, to the block `out`; in float32."""
    size = len(out)
    for stage in range(1, -1, -1):
        x, spare = rotate(x, spare, size)
        flip(x, size, start, stage, seed)
    for j in range(size):
        out[j] = min(max(x[j] * scale, -LARGEST), LARGEST)


@compiled
def _eden(values, sizes, seed, centres, x, spare, indices, scales):
    """Rotate and quantise each block; values float32 [n], x and spare float32 [8192]."""
    start = np.int64(0)  # a literal 0 would compile what takes it a second time
    for b in range(len(sizes)):
        end = start + sizes[b]
        norm, x, spare = rotate_block(values[start:end], start, x, spare, seed)
        product = _quantise(x, centres, indices[start:end])
        scales[b] = min(norm / product, LARGEST) if norm > 0 else 0.0
        start = end


@compiled
def _quantise(x, centres, indices):
    """Find the nearest centre for each value of a block; returns the sum of value * centre."""
    size, product = len(indices), 0.0
    for j in range(size):
        indices[j] = 0
    for k in range(len(centres) - 1):
        limit = np.float32((centres[k] + centres[k + 1]) / 2 * math.sqrt(size))
        for j in range(size):
            indices[j] += x[j] > limit
    for j in range(size):
        product += np.float64(x[j]) * centres[indices[j]]
    return product


@compiled
def _eden_back(indices, sizes, seed, centres, scales, x, spare, out):
    """The reverse of _eden but for the quantiser, all in float32."""
    start = np.int64(0)  # a literal 0 would compile what takes it a second time
    for b in range(len(sizes)):
        end = start + sizes[b]
        block = indices[start:end]
        for j in range(len(block)):
            x[j] = centres[index(block[j])]
        rotate_block_back(x, spare, start, seed, scales[b], out[start:end])
        start = end
