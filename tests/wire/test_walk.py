"""wire/walk.py: whatever it is given, it stays within the memory that it was given."""

import numpy as np
import pytest
from numba import njit

from layout import Layout
from wire.contexts import FIRST_SYMBOLS
from wire.entropy import _new_walk
from wire.range_coder import writing_state
from wire.rans import new_table
from wire.scan import as_grids, new_scratch, scan_order
from wire.walk import DONE, Grid, _positions, write_walk

LAYOUT = Layout(("conv", "row", "matrix", "kernel"), ((3, 2, 3, 3), (4000,), (9, 40), (1, 1, 50)))


def written(indices, levels, num_words: int, num_steps: int):
    """Write into the middle of arrays of ones. Returns (words and steps needed, the arrays)."""
    words = np.full(num_words + 40, 2**32 - 1, np.uint32)
    tape = np.full(num_steps + 40, 2**64 - 1, np.uint64)
    tensors = as_grids(LAYOUT)
    indices, levels, copies = scan_order(tensors, indices.copy(), levels.copy())
    room = words[20 : 20 + num_words], tape[20 : 20 + num_steps]
    walk = _new_walk(tensors, copies, indices, levels, 1, 32766, *room, new_scratch(tensors))
    ending, state, head = write_walk(walk, writing_state(), (np.uint64(0), 0))
    assert ending == DONE
    return (int(state[2]), int(head[1])), words, tape


@pytest.mark.parametrize("density", [0.0003, 0.02, 1.0])
@pytest.mark.parametrize("largest", [3, 32767])
def test_a_writer_counts_what_does_not_fit_and_does_not_write_it(density, largest):
    """Empty cells, numbers and escapes write words, and carries reach back into earlier ones."""
    rng = np.random.default_rng(0)
    chosen = rng.random(LAYOUT.size) < density
    chosen[[60, -1]] = True
    indices = np.flatnonzero(chosen)
    levels = rng.integers(1, largest + 1, len(indices)).astype(np.int16)
    needed, whole_words, whole_tape = written(indices, levels, 20_000, 20_000)
    for rooms in [(0, 0), needed, *((needed[0] * k // 29, needed[1] * k // 23) for k in range(23))]:
        found, words, tape = written(indices, levels, *rooms)
        assert found == needed
        for array in (words, tape):
            assert (array[:20] == array[0]).all() and (array[-20:] == array[0]).all()
            assert array[0] == np.iinfo(array.dtype).max
    words, tape = written(indices, levels, *needed)[1:]
    assert (words[20:-20] == whole_words[20 : 20 + needed[0]]).all()
    assert (tape[20:-20] == whole_tape[20 : 20 + needed[1]]).all()


@njit
def read_positions(grid, w, head):
    return _positions(True, grid.width > 3, 0, 0, grid, w, head)[0]


@pytest.mark.parametrize("kernel", [(40, 1), (20, 2), (10, 4), (5, 5), (7, 7)])
def test_a_strangers_positions_stay_within_their_kernel(kernel):
    """All ones: three positions of each three, however few are there."""
    size, table = kernel[0] * kernel[1], new_table(FIRST_SYMBOLS)
    lanes = table[1].reshape(-1, 16)
    lanes[:, 4:11] = np.arange(1, 8)  # symbol 7 has nearly all of the 32768
    lanes[:, 11] = 32767
    tensors = as_grids(Layout(("w",), ((1, 1, *kernel),)))
    nothing = np.zeros(0, np.int64)
    tape, scratch = np.full(200, 1 << 20), new_scratch(tensors)
    walk = _new_walk(tensors, nothing, nothing, nothing, 1, 0, nothing, tape, scratch)
    walk = walk._replace(table=table, positions=np.full(4 * size, -1))
    head = np.uint64((1 << 40) + 16000), 0
    assert read_positions(Grid(*tensors[0]), walk, head) == 0
    assert (walk.positions[size + 3 :] == -1).all()
