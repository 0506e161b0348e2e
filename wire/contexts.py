"""The contexts of entropy.py's walk: where they stand, how they begin, and what chooses one."""

import numpy as np

from compiled import index, inlined
from wire.range_coder import clamp, new_model
from wire.rans import first_words

# Where each bank of contexts begins: of decisions,
TENSORS = 0  # any[flat], copy[flat]
ROWS = 4  # 13 banks of 32: cells of a row; the first is shared by all rows
ESCAPES = ROWS + 13 * 32  # 3 banks of 32: all, in kernels, in flat tensors
OCCUPIED = ESCAPES + 3 * 32  # 68 ratios of how many cells are due to how many are left
SIGN = OCCUPIED + 68  # prediction, kernel, row
FLAT_SIGN = SIGN + 9 * 5 * 5  # row, column
NUM_DECISIONS = FLAT_SIGN + 9 * 9
# and of symbols.
MASK = 0  # first of its row or not, row, the three above, how many are set or two to the left
MAGNITUDE = MASK + 2 * 3 * 8 * 4  # prediction, how many of the kernel are set
FLAT_MAGNITUDE = MAGNITUDE + 12 * 4  # 9 ratios, as above
NUM_SYMBOLS = FLAT_MAGNITUDE + 9

# How many of these a prediction's excess over the least magnitude reaches.
NEARNESS = np.digitize(np.arange(64), [1, 2, 3, 5, 7, 10, 16, 26, 51]).astype(np.int64)


def _first_probabilities() -> tuple[np.ndarray, np.ndarray]:
    """Of each decision, what is likely before anything was seen: (probabilities, counts)."""
    probability = np.full(NUM_DECISIONS, 32768, np.int64)
    count = np.zeros(NUM_DECISIONS, np.int64)
    for ratio in range(68):  # 2^((ratio - 43) / 4), at most 0.8
        octave = (65536, 77936, 92682, 110218)[(ratio - 43) % 4]
        probability[OCCUPIED + ratio] = min(52429, octave >> max(0, (46 - ratio) // 4))
    count[OCCUPIED:SIGN] = 6
    for c in range(9 * 5 * 5):
        score = 2 * (c // 25 - 4) + c // 5 % 5 - 2 + (c % 5 - 2) // 2
        other = 65536 // (1 + 2 ** abs(score))
        probability[SIGN + c] = other if score >= 0 else 65536 - other
    count[SIGN:FLAT_SIGN] = 3
    return probability, count


# Before anything was seen; of three positions few are set, and magnitudes are near the least.
FIRST_DECISIONS = new_model(*_first_probabilities())
FIRST_SYMBOLS = first_words(
    np.array(
        [(24, 8, 8, 4, 8, 4, 4, 4, 1)] * MAGNITUDE
        + [(16, 16, 12, 8, 10, 10, 8, 4, 2)] * (NUM_SYMBOLS - MAGNITUDE)
    )
)


# --- numbers that choose contexts -----------------------------------------------------------------


@inlined
def _size_of_sum(total, least):
    """A sum of levels as -4..4, in units of the least magnitude."""
    a = abs(total)
    size = 0 if a == 0 else 1 if a < least else 2 if a < 3 * least else 3 if a < 8 * least else 4
    return -size if total < 0 else size


@inlined
def _nearness(predicted, least):
    """A predicted level as 0..11: far below the least magnitude to far above it."""
    a = abs(predicted)
    if a < least:
        return 0 if a == 0 else 1 if 2 * a < least else 2
    return 2 + NEARNESS[index(min(a - least + 1, 63))]


@inlined
def of_kernel_level(kernel, slot, width, num_set, kernel_signs, row_signs, least):
    """Contexts of a level within a kernel: (of its sign, of its magnitude).

    Of the levels left, above and above left, their plane predicts this one.
    """
    above = slot - width - 1
    predicted = kernel[index(slot - 1)] + kernel[index(above)] - kernel[index(above - 1)]
    near = _nearness(predicted, least)
    side = min(near, 4) if predicted > 0 else -min(near, 4)
    signs = 5 * clamp(kernel_signs, -2, 2) + clamp(row_signs, -2, 2)
    return SIGN + 25 * (side + 4) + signs + 12, MAGNITUDE + 4 * near + min(num_set // 3, 3)


@inlined
def of_single_level(row_sum, column_sum, ratio, least):
    """Contexts of a level that is a cell of its own: (of its sign, of its magnitude)."""
    signs = 9 * (_size_of_sum(row_sum, least) + 4) + _size_of_sum(column_sum, least) + 4
    return FLAT_SIGN + signs, FLAT_MAGNITUDE + (ratio >> 3)
