"""ternary: sign(v) times the mean magnitude of what is not zero, or 0.

STC (Sattler et al. 2019, arXiv 1903.02891), for few selected values and error feedback.
"""

import numpy as np

from compressors.coder import Words
from compressors.levels import Levels, mean_magnitude


class Ternary(Levels):
    """Of n values that are not zero, d is the squared mean / the mean square: at least 1 / n."""

    words = Words("ternary")
    bits_per_value = 2
    contractive, keeps_norms, ruins_models = True, True, True
    largest_level, bits_sent = 1, range(2, 3)

    def quantise(self, values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return np.sign(values).astype(np.int16), mean_magnitude(values, np.count_nonzero(values))

    def bits_of(self, levels: np.ndarray) -> int:
        return 2
