"""wire/walk.py: a stranger's numbers stay within what belongs to them."""

import numpy as np
import pytest
from numba import njit

from layout import Layout
from wire.contexts import FIRST_SYMBOLS
from wire.entropy import _new_walk
from wire.rans import new_table
from wire.scan import Grid, as_grids
from wire.walk import _positions


@njit
def read_positions(grid, w, head):
    return _positions(True, 0, 0, grid, w, head)[0]


@pytest.mark.parametrize("kernel", [(40, 1), (20, 2), (10, 4), (5, 5), (7, 7)])
def test_a_strangers_positions_stay_within_their_kernel(kernel):
    """All ones: three positions of each three, however few are there."""
    size, table = kernel[0] * kernel[1], new_table(FIRST_SYMBOLS)
    lanes = table[1].reshape(-1, 16)
    lanes[:, 4:11] = np.arange(1, 8)  # symbol 7 has nearly all of the 32768
    lanes[:, 11] = 32767
    tensors = as_grids(Layout(("w",), ((1, 1, *kernel),)))
    nothing = np.zeros(0, np.int64)
    walk = _new_walk(tensors, nothing, nothing, nothing, 1, 0, nothing, np.full(200, 1 << 20))
    walk = walk._replace(table=table, positions=np.full(4 * size, -1))
    head = np.uint64((1 << 40) + 16000), 0
    assert read_positions(Grid(*tensors[0]), walk, head) == 0
    assert (walk.positions[size + 3 :] == -1).all()
