"""Value coders: float32 numbers as fewer bits, and back.

Integer levels times a scale: n-bit linear, ternary (STC, Sattler et al. 2019, arXiv 1903.02891),
sign (EF-sign, Karimireddy et al. 2019, arXiv 1901.09847), error-bounded, and the unbiased QSGD
(Alistarh et al. 2017, arXiv 1610.02132). docs/wire-format.md specifies every bit.

A reader computes what arrives by elementwise float operations in a fixed order only, so that all
machines decode the same bits. Nothing overflows: what would, becomes the largest float32.
"""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch

from compiled import compiled, uniform
from layout import Layout
from wire.bits import pack_bits, unpack_bits
from wire.container import Reader

Buffer = bytes | memoryview
FP32, FP16, BF16, LEVELS, TENSOR_LEVELS, BUCKET_LEVELS, EDEN, POWERSGD = range(8)  # kinds
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


@compiled
def _stochastic_levels(numbers, steps, seed, levels, scales):
    """Write floor(abs(v) / scale + uniform) with v's sign: the mean over draws is v / scale."""
    for b in range(len(scales)):
        scale = np.float64(scales[b])
        for i in range(b * BUCKET, min((b + 1) * BUCKET, len(numbers))):
            size = abs(np.float64(numbers[i])) / scale if scale > 0 else 0.0
            level = min(np.int64(size + uniform(seed, i)), steps)
            levels[i] = level if numbers[i] > 0 else -level


def _qsgd(numbers: np.ndarray, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """QSGD over buckets, scaled by the largest magnitude in place of the paper's 2-norm.

    That is as unbiased, and at 512 values a bucket its variance is many times lower.
    """
    starts = np.arange(0, len(numbers), BUCKET)
    largest = np.maximum.reduceat(np.abs(numbers), starts) if len(starts) else np.zeros(0)
    scales = _scales(largest.astype(np.float64), steps)
    levels = np.empty(len(numbers), np.int16)
    _stochastic_levels(numbers, steps, np.uint64(seed & 2**64 - 1), levels, scales)
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


def levels_size(kind: int, bits: int, layout: Layout, count: int) -> int:
    """The bytes that write_levels() makes of `count` levels."""
    return 4 * len(num_values(kind, layout, count)) + -(-count * bits // 8)
