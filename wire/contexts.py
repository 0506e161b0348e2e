"""The contexts of the walk (walk.py): where each one stands, how it begins, and what chooses it."""

import numpy as np

from compiled import index, inlined
from wire.range_coder import clamp, new_model
from wire.rans import first_words

# Where the contexts of each kind of decision begin, and what they depend on.
TENSORS = 0  # does a tensor hold anything, and is it a copy: has it one row or several
ROWS = 4  # how many cells of a row hold something: a bank of 32 for all rows, and 12 for the usual
ESCAPES = ROWS + 13 * 32  # large magnitudes: 3 banks of 32: all, in kernels, in flat tensors
OCCUPIED = ESCAPES + 3 * 32  # does a cell hold something: 68 ratios of cells due to cells left
SIGN = OCCUPIED + 68  # the sign of a level in a kernel: its prediction, the kernel, the row
FLAT_SIGN = SIGN + 9 * 5 * 5  # the sign of a level that is a cell of its own: the row, the column
NUM_DECISIONS = FLAT_SIGN + 9 * 9
# The same for each kind of symbol.
MASK = 0  # three positions: first of their row?, row, the three above, set so far or to the left
MAGNITUDE = MASK + 2 * 3 * 8 * 4  # in a kernel: the prediction, and how many positions are set
FLAT_MAGNITUDE = MAGNITUDE + 12 * 4  # of a cell of its own: 9 ratios, as above
NUM_SYMBOLS = FLAT_MAGNITUDE + 9

# For n = 0..63: how many of these edges n reaches. n is how far a prediction exceeds the least
# magnitude.
NEARNESS = np.digitize(np.arange(64), [1, 2, 3, 5, 7, 10, 16, 26, 51]).astype(np.int64)


def _first_probabilities() -> tuple[np.ndarray, np.ndarray]:
    """How likely a one is before anything was seen: (probabilities in 1/65536, counts)."""
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


# Before anything was seen: of three positions few are set, and magnitudes are near the least one.
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
    """The class of a sum of levels, -4..4, in units of the least magnitude."""
    a = abs(total)
    size = 0 if a == 0 else 1 if a < least else 2 if a < 3 * least else 3 if a < 8 * least else 4
    return -size if total < 0 else size


@inlined
def _nearness(predicted, least):
    """The class of a predicted level other than 0: from far below the least magnitude to far above.

    Returns (class: 1..11, side: the class up to 4 with the sign of the prediction). There is no
    branch, since a CPU would guess it wrong.
    """
    a = abs(predicted)
    far_below = 2 * a < least
    near = 2 + NEARNESS[index(clamp(a - least + 1, 0, 63))] - far_below
    side = clamp(a - least + 3, 2, 4) - far_below  # min(near, 4), but it does not wait for near
    return near, side if predicted > 0 else -side


@inlined
def of_kernel_level(kernel, slot, width, num_set, signs, least):
    """The contexts of a level within a kernel: (of its sign, of its magnitude).

    The plane through the levels to the left, above, and above to the left predicts the level.
    signs: the sums of the signs so far in the cell and in its row.
    """
    above = slot - width - 1
    predicted = kernel[index(slot - 1)] + kernel[index(above)] - kernel[index(above - 1)]
    signs = 5 * clamp(signs[0], -2, 2) + clamp(signs[1], -2, 2)
    crowd = min(num_set // 3, 3)
    if predicted == 0:  # often so: where a CPU guesses this, it need not wait for the level before
        return SIGN + 25 * 4 + signs + 12, MAGNITUDE + crowd
    near, side = _nearness(predicted, least)
    return SIGN + 25 * (side + 4) + signs + 12, MAGNITUDE + 4 * near + crowd


@inlined
def of_single_level(row_sum, column_sum, ratio, least):
    """The contexts of a level that is a cell of its own: (of its sign, of its magnitude)."""
    signs = 9 * (_size_of_sum(row_sum, least) + 4) + _size_of_sum(column_sum, least) + 4
    return FLAT_SIGN + signs, FLAT_MAGNITUDE + (ratio >> 3)
