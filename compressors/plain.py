"""Floating-point numbers of 32 or 16 bits. Each is rounded to the nearest, ties to even."""

import numpy as np

from compiled import compiled
from compressors.coder import Buffer, Coder, Words
from layout import Layout
from wire.container import Reader

FP16_MAX = float(np.finfo(np.float16).max)


class Fp32(Coder):
    words = Words("fp32")
    kind = 0
    bits_per_value = 32
    variance = 0.0

    def write(self, values: np.ndarray, layout: Layout, seed: int) -> Buffer:
        return memoryview(values.astype("<f4", copy=False)).cast("B")

    @classmethod
    def read(cls, reader: Reader, layout: Layout, count: int) -> np.ndarray:
        return reader.take("<f4", count)


class Fp16(Coder):
    """IEEE 754 binary16. Biased by up to 2^-11 of a value, since rounding errs alike each time."""

    words = Words("fp16")
    kind = 1
    bits_per_value = 16
    contractive, keeps_norms = True, True

    def write(self, values: np.ndarray, layout: Layout, seed: int) -> bytes:
        return np.clip(values, -FP16_MAX, FP16_MAX).astype("<f2").tobytes()

    @classmethod
    def read(cls, reader: Reader, layout: Layout, count: int) -> np.ndarray:
        return reader.take("<f2", count).astype(np.float32)


class Bf16(Coder):
    """The upper half of a float32: its range, and 8 bits of precision. Biased by up to 2^-9."""

    words = Words("bf16")
    kind = 2
    bits_per_value = 16
    contractive, keeps_norms = True, True

    def write(self, values: np.ndarray, layout: Layout, seed: int) -> bytes:
        halves = np.empty(len(values), np.uint16)
        _upper_halves(np.ascontiguousarray(values).view(np.uint32), halves)
        return halves.astype("<u2", copy=False).tobytes()

    @classmethod
    def read(cls, reader: Reader, layout: Layout, count: int) -> np.ndarray:
        values = np.empty(count, np.float32)
        bits = values.view(np.uint32)
        bits[:] = reader.take("<u2", count)
        bits <<= 16
        return values


@compiled
def _upper_halves(bits, halves):
    """Round float32 numbers, given as their bits, to their upper halves; clamp to the largest."""
    for i in range(len(bits)):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        rounded = magnitude + np.uint32(0x7FFF) + (magnitude >> np.uint32(16) & np.uint32(1))
        half = min(rounded >> np.uint32(16), np.uint32(0x7F7F))
        halves[i] = half | (bits[i] >> np.uint32(16) & np.uint32(0x8000))
