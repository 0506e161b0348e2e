"""Value coders: float32 numbers as fewer bits, and back.

Integer levels times a scale: n-bit linear, ternary (STC, Sattler et al. 2019, arXiv 1903.02891),
sign (EF-sign, Karimireddy et al. 2019, arXiv 1901.09847), error-bounded, and the unbiased QSGD
(Alistarh et al. 2017, arXiv 1610.02132). Rotated: EDEN (Vargaftik et al. 2022, arXiv 2108.08842).
Low rank: PowerSGD (Vogels et al. 2019, arXiv 1905.13727). docs/wire-format.md specifies every bit.

A reader computes what arrives by elementwise float operations in a fixed order only, so that all
machines decode the same bits. Nothing overflows: what would, becomes the largest float32.
"""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit

from wire import Layout, PayloadError, Reader

Buffer = bytes | memoryview
FP32, FP16, BF16, LEVELS, TENSOR_LEVELS, BUCKET_LEVELS, EDEN, POWERSGD = range(8)  # kinds
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = np.float32(2.0**-149)
FP16_MAX = torch.finfo(torch.float16).max
BF16_MAX = torch.finfo(torch.bfloat16).max
BUCKET = 512  # values that share a scale in QSGD
MAX_LEVEL = 32767  # of the bounded coder, and of the levels of 16 bits

VALID = (
    "fp32, fp16, bf16, int2..int16, qsgd2..qsgd8, ternary, sign, eden1..eden4, "
    "bounded(EPS) with 1/32000 <= EPS <= 0.5, powersgd(R) with 1 <= R <= 65535"
)
RANGES = {"int": (2, 16), "qsgd": (2, 8), "eden": (1, 4), "powersgd": (1, 65535)}
RANGES |= {"bounded": (1 / 32000, 0.5)}


@dataclass(frozen=True)
class Values:
    """How values travel: the coder's name, and its bits, error bound or rank (0 if it has none)."""

    name: str
    number: float = 0


def parse_values(word: str) -> Values:
    """Read a word such as int8 or bounded(0.01). Raises ValueError with the valid forms."""
    if word in ("fp32", "fp16", "bf16", "ternary", "sign"):
        return Values(word)
    match = re.fullmatch(r"(int|qsgd|eden)(\d+)|(powersgd)\((\d+)\)|(bounded)\(([\d.e+-]+)\)", word)
    name, number = [part for part in match.groups() if part] if match else ("", "0")
    try:
        number = float(number) if name == "bounded" else int(number)
    except ValueError:
        name = ""
    if not name or not RANGES[name][0] <= number <= RANGES[name][1]:
        raise ValueError(f"{word!r} is no kind of values; valid are {VALID}")
    return Values(name, number)


def _compiled(function, **options):
    """numba's machine code: compiled in a second at first use, then loaded where it can be kept."""
    options |= {"_nrt": False, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither __pycache__ nor the user's cache folder can be written
        return njit(**options)(function)


@_compiled
def _random(seed, k):
    """Output k (from 0) of SplitMix64 (Steele et al. 2014) with that seed; both uint64."""
    z = seed + (k + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@_compiled
def _uniform(seed, k):
    """A number in [0, 1) of 53 random bits."""
    return np.float64(_random(seed, np.uint64(k)) >> np.uint64(11)) * 2.0**-53


# --- plain numbers --------------------------------------------------------------------------------


def write_fp32(numbers: np.ndarray) -> Buffer:
    return memoryview(numbers.astype("<f4", copy=False)).cast("B")


def read_fp32(reader: Reader, count: int) -> np.ndarray:
    return reader.take("<f4", count)


def write_fp16(numbers: np.ndarray) -> Buffer:
    return np.clip(numbers, -FP16_MAX, FP16_MAX).astype("<f2").tobytes()


def read_fp16(reader: Reader, count: int) -> np.ndarray:
    return reader.take("<f2", count).astype(np.float32)


def write_bf16(numbers: np.ndarray) -> Buffer:
    halves = torch.from_numpy(np.clip(numbers, -BF16_MAX, BF16_MAX)).to(torch.bfloat16)
    return halves.view(torch.int16).numpy().astype("<i2").tobytes()


def read_bf16(reader: Reader, count: int) -> np.ndarray:
    high = reader.take("<u2", count).astype(np.uint32)  # the upper half of a float32
    return (high << 16).view(np.float32)


# name: (kind, writer, reader); all round to nearest, ties to even, and clamp to their largest.
PLAIN = {
    "fp32": (FP32, write_fp32, read_fp32),
    "fp16": (FP16, write_fp16, read_fp16),
    "bf16": (BF16, write_bf16, read_bf16),
}


# --- levels ---------------------------------------------------------------------------------------


def quantise(
    values: Values, numbers: np.ndarray, layout: Layout | None, seed: int
) -> tuple[int, np.ndarray, np.ndarray]:
    """float32 [n] as integers times scales. Returns (kind, levels int16 [n], scales float32).

    layout is None for selected numbers; a whole vector gets a scale for each tensor (int) there.
    """
    if values.name == "qsgd":
        return BUCKET_LEVELS, *_qsgd(numbers, 2 ** (values.number - 1) - 1, seed)
    if values.name == "ternary":
        scale = _mean_magnitude(numbers, np.count_nonzero(numbers))
        return LEVELS, np.sign(numbers).astype(np.int16), scale
    if values.name == "sign":
        scale = _mean_magnitude(numbers, len(numbers))
        return LEVELS, np.where(numbers < 0, np.int16(-1), np.int16(1)), scale
    if values.name == "bounded":
        # Two roundings of float32 are left room for; so is twice the level, for denormal scales.
        steps = math.ceil(1 / (2 * (values.number - 2.0**-23)))
        return LEVELS, *_linear(numbers, np.array([len(numbers)]), steps, MAX_LEVEL)
    steps = 2 ** (values.number - 1) - 1
    if layout is None:
        return LEVELS, *_linear(numbers, np.array([len(numbers)]), steps, steps)
    levels, scales = _linear(numbers, layout.sizes, steps, steps)
    return TENSOR_LEVELS, levels, scales[layout.sizes > 0]


def _mean_magnitude(numbers: np.ndarray, count: int) -> np.ndarray:
    return np.array([np.abs(numbers).sum(dtype=np.float64) / max(count, 1)], np.float32)


def _linear(
    numbers: np.ndarray, sizes: np.ndarray, steps: int, largest_level: int
) -> tuple[np.ndarray, np.ndarray]:
    """(levels [n], scales [num_tensors]): round(v / scale), scale = max abs(v) / steps."""
    filled = sizes > 0
    largest = np.zeros(len(sizes))
    if filled.any():
        starts = np.cumsum(sizes) - sizes
        largest[filled] = np.maximum.reduceat(np.abs(numbers), starts[filled])
    scales = _scales(largest, steps)
    divisors = np.where(scales > 0, scales, np.float32(1))
    levels = numbers / (divisors if len(sizes) == 1 else np.repeat(divisors, sizes))
    levels = np.clip(np.rint(levels, out=levels), -largest_level, largest_level, out=levels)
    return levels.astype(np.int16), scales


def _scales(largest: np.ndarray, steps: int) -> np.ndarray:
    """largest / steps in float32 [n], rounded down so that steps * scale cannot overflow."""
    scales = (largest / steps).astype(np.float32)
    too_large = scales.astype(np.float64) * steps > largest
    scales[too_large] = np.nextafter(scales[too_large], np.float32(0))
    return np.where((largest > 0) & (scales == 0), SMALLEST, scales)


@_compiled
def _stochastic_levels(numbers, steps, seed, levels, scales):
    """Write floor(abs(v) / scale + uniform) with v's sign: the mean over draws is v / scale."""
    for b in range(len(scales)):
        scale = np.float64(scales[b])
        for i in range(b * BUCKET, min((b + 1) * BUCKET, len(numbers))):
            size = abs(np.float64(numbers[i])) / scale if scale > 0 else 0.0
            level = min(np.int64(size + _uniform(seed, i)), steps)
            levels[i] = level if numbers[i] > 0 else -level


def _qsgd(numbers: np.ndarray, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """QSGD over buckets, scaled by the largest magnitude in place of the paper's 2-norm.

    That is as unbiased, and at 512 values a bucket its variance is many times lower.
    """
    starts = np.arange(0, len(numbers), BUCKET)
    largest = np.maximum.reduceat(np.abs(numbers), starts) if len(starts) else np.zeros(0)
    scales = _scales(largest.astype(np.float64), steps)
    levels = np.empty(len(numbers), np.int16)
    _stochastic_levels(numbers, steps, np.uint64(seed), levels, scales)
    return levels, scales


def level_bits(values: Values, levels: np.ndarray) -> int:
    """Bits of a level: in one bit, 0 is +1 and 1 is -1; else two's complement."""
    if values.name in ("int", "qsgd"):
        return values.number
    if values.name == "sign":
        return 1
    return max(2, int(np.abs(levels).max(initial=0)).bit_length() + 1)


def write_levels(bits: int, levels: np.ndarray, scales: np.ndarray) -> bytes:
    return scales.astype("<f4").tobytes() + pack_bits(levels < 0 if bits == 1 else levels, bits)


def read_levels(reader: Reader, bits: int, owners_of_scales: np.ndarray) -> np.ndarray:
    """float32 [n]; owners_of_scales: how many values each scale has, int64 [num_scales]."""
    scales = reader.take("<f4", len(owners_of_scales))
    fields = unpack_bits(reader, int(owners_of_scales.sum()), bits)
    if bits == 1:
        levels = 1 - 2 * fields
    else:
        levels = fields << (16 - bits) >> (16 - bits)
    return times(levels, scales if len(scales) == 1 else np.repeat(scales, owners_of_scales))


def times(levels: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """levels * scales in float32; a caller that reads a stranger's refuses what is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return levels.astype(np.float32) * scales.astype(np.float32, copy=False)


def num_values(kind: int, layout: Layout, count: int) -> np.ndarray:
    """How many of `count` values belong to each scale, int64 [num_scales]."""
    if kind == TENSOR_LEVELS:
        return layout.sizes[layout.sizes > 0]
    if kind == LEVELS:
        return np.array([count])
    return np.minimum(BUCKET, count - np.arange(0, count, BUCKET))


# --- bit streams ----------------------------------------------------------------------------------


@_compiled
def _pack(fields, bits, out):
    """The low `bits` of each field, highest first; fields int16 [n], out uint8."""
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


@_compiled
def _unpack(stream, bits, out):
    """The reverse. Returns what is left over of the last byte, which must be 0."""
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
    out = np.empty(-(-len(fields) * bits // 8), np.uint8)
    _pack(fields.astype(np.int16, copy=False), bits, out)
    return out.tobytes()


def unpack_bits(reader: Reader, count: int, bits: int) -> np.ndarray:
    """int16 [count]: the fields, without a sign unless they have 16 bits. Raises PayloadError."""
    stream = reader.take("u1", -(-count * bits // 8))
    fields = np.empty(count, np.int16)
    if _unpack(stream, bits, fields) != 0:
        raise PayloadError("the padding after packed values is not zero")
    return fields


# --- EDEN -----------------------------------------------------------------------------------------

LARGEST_BLOCK, SMALLEST_BLOCK = 8192, 16
# The non-negative half of the Lloyd-Max quantiser's values for N(0, 1), by bits.
CENTROIDS = {
    1: (0.79788456,),
    2: (0.45278005, 1.5104176),
    3: (0.24509418, 0.75600522, 1.3439093, 2.1519457),
    4: (0.12839503, 0.38804832, 0.65675895, 0.94234003, 1.2562312, 1.6180464, 2.0690172, 2.7326357),
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


@_compiled
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


@_compiled
def _flip(x, size, start, stage, seed):
    """Change signs by bit i % 64 of random number 2 * (i // 64) + stage, i counting from start."""
    for begin in range(0, size, 64):
        i = start + begin
        word = _random(seed, np.uint64(2 * (i // 64) + stage)) >> np.uint64(i % 64)
        for j in range(min(64, size - begin)):
            sign = np.int32(word >> np.uint64(j) & np.uint64(1))
            x[begin + j] *= np.float32(1 - 2 * sign)


@_compiled
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


@_compiled
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


def packed_size(kind: int, bits: int, layout: Layout, count: int) -> int:
    """The bytes of packed values after the one that says how many bits they have."""
    if kind != EDEN:
        return 4 * len(num_values(kind, layout, count)) + -(-count * bits // 8)
    sizes = blocks(count)
    rotated = int(sizes.sum())
    return 8 + 4 * len(sizes) + -(-rotated * bits // 8) + 4 * (count - rotated)


# --- PowerSGD -------------------------------------------------------------------------------------


@_compiled
def _fill(seed, out):
    for k in range(len(out)):
        out[k] = 2 * _uniform(seed, k) - 1


def _factors(shape: tuple[int, ...], rank: int) -> tuple[int, int, int]:
    """(rows, columns, rank) of a tensor that travels as two factors; rank is 0 if it does not."""
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (0, 0)
    rank = min(rank, rows, columns)
    return rows, columns, rank if rank * (rows + columns) < rows * columns else 0


def write_powersgd(numbers: np.ndarray, layout: Layout, rank: int, seed: int) -> bytes:
    """Each matrix M [rows, columns] as P = orth(M Q) and M^T P: one power step from a random Q.

    Without the paper's warm start: it needs the same group in each round, which federated
    sampling does not give. Tensors that factors would not shorten go raw.
    """
    parts = [rank.to_bytes(2, "little")]
    for start, shape, size in zip(layout.offsets, layout.shapes, layout.sizes, strict=False):
        rows, columns, low = _factors(shape, rank)
        tensor = numbers[start : start + size]
        if low:
            matrix = tensor.reshape(rows, columns).astype(np.float64)
            random = np.empty(columns * low)
            _fill(np.uint64(seed & 2**64 - 1) + np.uint64(start), random)
            p = np.linalg.qr(matrix @ random.reshape(columns, low))[0].astype("<f4")
            q = np.clip(matrix.T @ p.astype(np.float64), -LARGEST, LARGEST).astype("<f4")
            parts += [p.tobytes(), q.tobytes()]
        else:
            parts.append(tensor.astype("<f4").tobytes())
    return b"".join(parts)


def read_powersgd(reader: Reader, layout: Layout) -> np.ndarray:
    """P Q^T, summed over the rank in order and in float64."""
    rank = int(reader.take("<u2", 1)[0])
    if rank == 0:
        raise PayloadError("a rank of 0")
    out = np.empty(layout.size, np.float32)
    for start, shape, size in zip(layout.offsets, layout.shapes, layout.sizes, strict=False):
        rows, columns, low = _factors(shape, rank)
        if not low:
            out[start : start + size] = reader.take("<f4", size)
            continue
        p = reader.take("<f4", rows * low).reshape(rows, low).astype(np.float64)
        q = reader.take("<f4", columns * low).reshape(columns, low).astype(np.float64)
        if not (np.isfinite(p).all() and np.isfinite(q).all()):
            raise PayloadError("a factor is not finite")
        total = p[:, :1] * q[:, 0]
        for r in range(1, low):
            total += p[:, r : r + 1] * q[:, r]
        out[start : start + size] = np.clip(total, -LARGEST, LARGEST).reshape(-1)
    return out
