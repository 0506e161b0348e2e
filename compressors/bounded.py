"""bounded(E): no value is off by more than E times the largest magnitude; zeros cost nothing."""

import math

import numpy as np

from compressors.coder import Words
from compressors.levels import ENOUGH_STEPS, Levels, rounded


class Bounded(Levels):
    """As int<n> with one scale and d = 4 s^2 / (4 s^2 + n - 1), where s is `steps`."""

    words = Words("bounded({})", 1 / 32000, 0.5)
    bits_per_value = 32
    contractive = True

    @property
    def steps(self) -> int:
        """The level of the largest magnitude; two roundings of float32 are left room for."""
        return math.ceil(1 / (2 * (self.number - 2.0**-23)))

    @property
    def keeps_norms(self) -> bool:
        return self.steps >= ENOUGH_STEPS

    @property
    def ruins_models(self) -> bool:
        return self.steps <= 2

    @property
    def largest_level(self) -> int:
        return 2 * self.steps  # reached where the scale is a denormal number

    def quantise(self, values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return rounded(values, np.array([len(values)]), self.steps, self.largest_level)

    def bits_of(self, levels: np.ndarray) -> int:
        return max(2, int(np.abs(levels).max(initial=0)).bit_length() + 1)

    @property
    def bits_sent(self) -> range:
        return range(2, self.largest_level.bit_length() + 2)
