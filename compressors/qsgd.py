"""qsgd2..qsgd8: levels that are rounded up or down at random, without a bias.

QSGD (Alistarh et al. 2017, arXiv 1610.02132).
"""

import math

import numpy as np

from compiled import compiled, uniform
from compressors.coder import Words
from compressors.levels import Levels, scales_of
from layout import Layout
from wire.container import PayloadError, Reader

BUCKET = 512  # values that share a scale


class Qsgd(Levels):
    """QSGD over buckets, scaled by the largest magnitude in place of the paper's 2-norm.

    That is as unbiased, and at 512 values a bucket its variance is many times lower.
    """

    words = Words("qsgd{}", 2, 8)
    kind = coded_kind = 5

    @property
    def variance(self) -> float:
        """(sqrt(1 + (n - 1) / s^2) - 1) / 2 for buckets of n values and s levels.

        A value f between two levels has the variance f (1 - f) in squared levels, and the largest,
        at level s, has none. The n - 1 others add the most to the error over the squared norm,
        (n - 1) f (1 - f) / (s^2 + (n - 1) f^2), at f = s (sqrt(s^2 + n - 1) - s) / (n - 1).
        """
        return (math.sqrt(1 + (BUCKET - 1) / self.steps**2) - 1) / 2

    @property
    def ruins_models(self) -> bool:
        return self.steps == 1

    @classmethod
    def counts(cls, layout: Layout, count: int) -> np.ndarray:
        return np.minimum(BUCKET, count - np.arange(0, count, BUCKET))

    def quantise(self, values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        starts = np.arange(0, len(values), BUCKET)
        largest = np.maximum.reduceat(np.abs(values), starts) if len(starts) else np.zeros(0)
        scales = scales_of(largest.astype(np.float64), self.steps)
        levels = np.empty(len(values), np.int16)
        _stochastic_levels(values, self.steps, np.uint64(seed & 2**64 - 1), levels, scales)
        return levels, scales

    def head(self, scales: np.ndarray, kept: np.ndarray) -> tuple[bytes, np.ndarray]:
        counts = np.bincount(kept // BUCKET, minlength=len(scales))
        parts = len(scales).to_bytes(4, "little"), scales.astype("<f4"), counts.astype("<u2")
        return b"".join(parts), counts

    def read_head(self, reader: Reader, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        num_scales = int(reader.take("<u4", 1)[0])
        if num_scales > -(-layout.size // BUCKET):
            raise PayloadError(f"{num_scales} scales are more than the layout allows")
        scales = reader.take("<f4", num_scales)
        return scales, reader.take("<u2", num_scales).astype(np.int64)


@compiled
def _stochastic_levels(values, steps, seed, levels, scales):
    """Write floor(abs(v) / scale + uniform) with v's sign: the mean over draws is v / scale."""
    for b in range(len(scales)):
        scale = np.float64(scales[b])
        for i in range(b * BUCKET, min((b + 1) * BUCKET, len(values))):
            size = abs(np.float64(values[i])) / scale if scale > 0 else 0.0
            level = min(np.int64(size + uniform(seed, i)), steps)
            levels[i] = level if values[i] > 0 else -level
