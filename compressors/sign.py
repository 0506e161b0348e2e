"""sign: each value's sign times the mean magnitude.

EF-sign (Karimireddy et al. 2019, arXiv 1901.09847), for use with error feedback.
"""

import numpy as np

from compressors.coder import Words
from compressors.levels import Levels, mean_magnitude


class Sign(Levels):
    """Of n values, d is the squared mean magnitude / the mean square: at least 1 / n."""

    words = Words("sign")
    bits_per_value = 1
    contractive, keeps_norms, ruins_models = True, True, True
    largest_level, bits_sent = 1, range(1, 2)

    def quantise(self, values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        levels = np.where(values < 0, np.int16(-1), np.int16(1))
        return levels, mean_magnitude(values, len(values))

    def bits_of(self, levels: np.ndarray) -> int:
        return 1
