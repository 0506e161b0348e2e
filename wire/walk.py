"""The walk through the tensors of a network, along which entropy.py writes and reads integers.

The parts below are nested as the numbers are: walk() goes through the tensors, _rows() through the
rows of one, _cells() through the cells of a row that hold something, and _levels() through the
levels of one cell. Which cells hold something and the signs are coded as yes/no decisions
(range_coder.py), the positions within a cell and the magnitudes as symbols (rans.py). What was seen
before in similar places chooses the context of each (contexts.py).

All parts are compiled into one routine, once to write and once to read. `reading` is a constant in
it, so both ends make the same choices by construction: a writer takes the entries from `w.indices`
and `w.levels`, and a reader puts them there. The walk computes in integers only, so payloads are
equal on every machine.

Shorthand: `w` is what the parts share (Walk), `grid` is the tensor at hand (Grid), `j` is the
number of entries that are done, `row` and `start` are the indices of the first entry of a row and
of a cell, `i` is a column. `state` and `head` are where the two coders stand (see range_coder.py
and rans.py).
"""

from typing import NamedTuple

import numpy as np

from compiled import compiled, index, part
from wire.contexts import ESCAPES, MASK, OCCUPIED, ROWS, TENSORS, of_kernel_level, of_single_level
from wire.range_coder import FAST, SLOW, clamp, code_number, decide, learn, log, share_of_ones, take
from wire.rans import ESCAPE, code_small_number, code_symbol

MAX_LEVEL = 32767

# How a walk ends.
DONE, BAD_COPY, TOO_MANY, ENDED, BAD_ROW, BAD_CELL, TOO_LARGE, TOO_FEW, EMPTY = range(9)
FAULTS = (
    "",
    "a copy of no tensor",
    "more values than announced",
    "the body ends early",
    "a row with more cells than columns",
    "a cell with no positions or others than it has",
    "a level that is too large",
    "fewer values than announced",
    "a tensor that is said to hold something, and does not",
)


class Grid(NamedTuple):
    """One tensor. Entry k of the cell at (row, column) has in the vector the index

    offset + row * row_stride + column * column_stride + k.
    """

    offset: int
    rows: int
    columns: int
    kernel: int  # how many entries a cell has
    width: int  # of a row of the kernel
    row_stride: int
    column_stride: int


class Walk(NamedTuple):
    """What the parts of a walk share."""

    tensors: np.ndarray  # int64 [num_tensors, 7]: a Grid each
    copies: np.ndarray  # int64 [num_tensors]: see scan.scan_order(); a reader does not use them
    indices: np.ndarray  # int64 [n], in the order of the walk; a reader fills them
    levels: np.ndarray  # int16 [n], none of them 0; a reader fills them
    least: int  # the smallest magnitude
    spread: int  # how much larger the largest magnitude is
    words: np.ndarray  # uint32: the code of range_coder.py
    model: np.ndarray  # its contexts
    tape: np.ndarray  # of rans.py
    table: tuple  # its contexts
    bounds: np.ndarray  # int64 [num_tensors + 1]: the walk notes where each tensor's entries begin
    # For each column of the tensor at hand, if it has several rows, int64:
    columns: np.ndarray  # 256 * c + log(2c + 1), where c of its cells hold something so far
    column_sums: np.ndarray  # the sum of its levels so far, if they are cells of their own
    # For the cell at hand, int64:
    kernel: np.ndarray  # its levels so far, with zeros to the left and above
    slots: np.ndarray  # where each position lies in `kernel`; the same for all cells of a tensor
    positions: np.ndarray  # the positions that hold something, ascending
    patterns: np.ndarray  # which ones hold something in each three of the row before


def _build_walk(reading):
    """Compile the walk to write or to read: `reading` is a constant in it."""

    def walk(w, state, head):
        """Code all levels. Returns (ending, state, head)."""
        j = 0
        for t in range(len(w.tensors)):
            w.bounds[t] = w.bounds[t + 1] = j
            grid = _grid(w.tensors, t)
            holds, state = _holds_any(reading, j, grid, w, state)
            if not holds:
                continue
            source, state = _source(reading, t, grid, w, state)
            if source == t:
                ending, j, state, head = _rows(reading, j, grid, w, state, head)
            else:
                ending, j = _copy(reading, source, grid, j, w)
            if ending != DONE:
                return ending, state, head
            w.bounds[t + 1] = j
        return DONE if j == len(w.indices) else TOO_FEW, state, head

    return compiled(walk)


# --- tensors --------------------------------------------------------------------------------------


@part
def _grid(tensors, t):
    rows, columns, size = tensors[t, 1], tensors[t, 2], tensors[t, 3]
    return Grid(tensors[t, 0], rows, columns, size, tensors[t, 4], tensors[t, 5], tensors[t, 6])


@part
def _holds_any(reading, j, grid, w, state):
    """Whether the tensor has a level that is not zero. Returns (0 or 1, state)."""
    end = grid.offset + grid.rows * grid.columns * grid.kernel
    bit = 1 if not reading and j < len(w.indices) and w.indices[index(j)] < end else 0
    return decide(reading, bit, TENSORS + (grid.rows == 1), FAST, state, w.words, w.model)


@part
def _is_alike(s, grid, w):
    """1 if tensor s has the rows, columns and kernel of the grid and holds something."""
    same = w.tensors[s, 1] == grid.rows and w.tensors[s, 2] == grid.columns
    same = same and w.tensors[s, 3] == grid.kernel
    return 1 if same and w.bounds[s + 1] > w.bounds[s] else 0


@part
def _source(reading, t, grid, w, state):
    """The earlier tensor that tensor t is a copy of, or t if it is none. Returns (tensor, state).

    The tensor is -1 if a payload names one that is not there.
    """
    num_alike = 0
    for s in range(t):
        num_alike += _is_alike(s, grid, w)
    if num_alike == 0:
        return t, state
    context, is_copy = TENSORS + 2 + (grid.rows == 1), w.copies[t] > 0
    is_copy, state = decide(reading, is_copy, context, FAST, state, w.words, w.model)
    if not is_copy:
        return t, state
    back = w.copies[t] - 1
    back, state = code_number(reading, back, ROWS, ROWS + 32, state, w.words, w.model)
    if back < 0 or back >= num_alike:
        return -1, state
    s = t
    while back >= 0:
        s -= 1
        back -= _is_alike(s, grid, w)
    return s, state


@part
def _copy(reading, source, grid, j, w):
    """The tensor holds what the source holds, in the same places. Returns (ending, j)."""
    if source < 0:
        return BAD_COPY, j
    first, num_copied = w.bounds[source], w.bounds[source + 1] - w.bounds[source]
    if j + num_copied > len(w.indices):
        return TOO_MANY, j
    if reading:
        shift = grid.offset - w.tensors[source, 0]
        for e in range(num_copied):
            w.indices[index(j + e)] = w.indices[index(first + e)] + shift
            w.levels[index(j + e)] = w.levels[index(first + e)]
    return DONE, j + num_copied


# --- rows -----------------------------------------------------------------------------------------


@part
def _rows(reading, j, grid, w, state, head):
    """All rows of a tensor. Returns (ending, j, state, head)."""
    _clear(grid, w)
    num_cells = 0  # that hold something, in the rows before
    for o in range(grid.rows):
        if reading and state[2] > len(w.words) + 2:  # only zeros come: do not walk on to the end
            return ENDED, j, state, head
        row = grid.offset + o * grid.row_stride
        due = 0 if reading else _num_occupied(row, j, grid, w)
        usual = min(log((num_cells // o if o else 0) + 1) >> 1, 11)
        bank = ROWS + 32 + 32 * usual
        due, state = code_number(reading, due, ROWS, bank, state, w.words, w.model)
        if due < 0 or due > grid.columns:
            return BAD_ROW, j, state, head
        if due:
            ending, j, state, head = _cells(reading, row, due, num_cells, j, grid, w, state, head)
            if ending != DONE:
                return ending, j, state, head
            num_cells += due
    return DONE if num_cells else EMPTY, j, state, head


@part
def _clear(grid, w):
    """Forget the columns of the tensor before, and find the slots of a kernel.

    A tensor of one row, which may be tens of millions of entries long, uses no memory for columns.
    """
    for i in range(grid.columns if grid.rows > 1 else 0):
        w.columns[index(i)] = w.column_sums[index(i)] = 0
    for k in range(grid.kernel):
        w.slots[index(k)] = (k // grid.width + 1) * (grid.width + 1) + k % grid.width + 1


@part
def _num_occupied(row, j, grid, w):
    """Writing: how many cells of a row hold something, from entry j on."""
    stride = grid.column_stride
    cells, cell_end, row_end = 0, row, row + (grid.columns - 1) * stride + grid.kernel
    while j < len(w.indices) and w.indices[index(j)] < row_end:
        if w.indices[index(j)] >= cell_end:
            cell_end = row + (w.indices[index(j)] - row) // stride * stride + grid.kernel
            if w.indices[index(j)] >= cell_end:  # between two columns of a matrix: another row's
                break
            cells += 1
        j += 1
    return cells


# --- cells ----------------------------------------------------------------------------------------


@part
def _cells(reading, row, due, num_cells, j, grid, w, state, head):
    """The `due` cells of a row that hold something. Returns (ending, j, state, head)."""
    sums = 0, 0  # of the row's levels so far, and of their signs
    ahead = num_cells  # cells of the rows before, in the column to come and those to its right
    i = -1
    while due:
        place = row, due, i, ahead, j
        if grid.rows > 1:
            i, ratio, ahead, state = _next_cell(reading, True, place, grid, w, state)
        else:
            i, ratio, ahead, state = _next_cell(reading, False, place, grid, w, state)
        due -= 1
        if grid.rows > 1:
            seen = (w.columns[index(i)] >> 8) + 1
            w.columns[index(i)] = seen << 8 | log(2 * seen + 1)
        start, num_set, w.positions[0] = row + i * grid.column_stride, 1, 0
        if grid.kernel > 1 and grid.width <= 3:
            num_set, head = _positions(reading, False, start, j, grid, w, head)
        elif grid.kernel > 1:
            num_set, head = _positions(reading, True, start, j, grid, w, head)
        if num_set == 0:
            return BAD_CELL, j, state, head
        if j + num_set > len(w.indices):
            return TOO_MANY, j, state, head
        cell = start, i, num_set, ratio, j
        if grid.kernel > 1:
            ending, sums, state, head = _levels(reading, True, cell, sums, grid, w, state, head)
        else:
            ending, sums, state, head = _levels(reading, False, cell, sums, grid, w, state, head)
        if ending != DONE:
            return ending, j, state, head
        j += num_set
    return DONE, j, state, head


@part
def _next_cell(reading, several, place, grid, w, state):
    """Find the next column, after i, whose cell holds something. Returns (i, ratio, ahead, state).

    `several` is a constant too: a tensor of one row has no rows before that tell of its columns.
    This is a loop of its own, so that registers hold all that it needs. Most cells hold nothing, so
    the decisions that say so stay in the loop, and the one that ends it comes after.
    """
    row, due, i, ahead, j = place
    log_due = log(due)
    while True:
        i += 1
        left = grid.columns - i
        ratio = log_due - log(2 * ahead + left) + 44
        if several:
            ratio += w.columns[index(i)] & 255
            ahead -= w.columns[index(i)] >> 8
        ratio = clamp(ratio, 0, 67)
        if due >= left:  # every cell that is left holds something
            return i, ratio, ahead, state
        context = OCCUPIED + ratio
        ones = share_of_ones(w.model[index(context)] >> 8, state)
        if reading:
            occupied = state[0] < ones
        else:
            occupied = w.indices[index(j)] < row + i * grid.column_stride + grid.kernel
        if occupied:
            break
        state = take(reading, 0, ones, state, w.words)
        learn(0, context, SLOW, w.model)
    state = take(reading, 1, ones, state, w.words)
    learn(1, context, SLOW, w.model)
    return i, ratio, ahead, state


@part
def _positions(reading, wide, start, j, grid, w, head):
    """Which positions of a cell hold something, three of a row at a time. Returns (number, head).

    They are left in w.positions. The number is 0 if there is none, or one that the cell has not.
    `wide` is a constant too: whether a row of the kernel has more than one three.
    """
    num_set, before, row, column = 0, 0, 0, 0
    while row * grid.width < grid.kernel:
        first, num_there, above = row * grid.width + column, grid.width, before
        if wide:
            num_there = min(grid.width - column, 3)
            above = w.patterns[index(column)] if row else 0
        pattern = 0 if reading else _pattern(start + first, num_there, j + num_set, w)
        context = MASK + 32 * min(row, 2) + 4 * above
        context += 96 + (before >> 1) if column else min(num_set, 3)
        pattern, head = code_symbol(reading, pattern, context, head, w.tape, w.table)
        if pattern >> num_there:  # refused at once: more would not fit into w.positions
            return 0, head
        for k in range(3):
            w.positions[index(num_set)] = first + k
            num_set += pattern >> k & 1
        before = pattern
        if wide:
            w.patterns[index(column)] = before
            column += 3
        if not wide or column >= grid.width:
            row, column = row + 1, 0
    return num_set, head


@part
def _pattern(first, num_there, j, w):
    """Writing: which of up to three entries from `first` on hold something, as bits."""
    pattern = 0
    for k in range(num_there):
        if j < len(w.indices) and w.indices[index(j)] == first + k:
            pattern |= 1 << k
            j += 1
    return pattern


# --- levels ---------------------------------------------------------------------------------------


@part
def _levels(reading, in_kernel, cell, sums, grid, w, state, head):
    """The levels of a cell. Returns (ending, sums, state, head). `in_kernel` is a constant too."""
    start, i, num_set, ratio, j = cell
    (row_sum, row_signs), cell_signs = sums, 0
    for n in range(num_set):
        position = w.positions[index(n)]
        slot = w.slots[index(position)]
        if in_kernel:
            signs = cell_signs, row_signs
            contexts = of_kernel_level(w.kernel, slot, grid.width, num_set, signs, w.least)
        else:
            column_sum = w.column_sums[index(i)] if grid.rows > 1 else 0
            contexts = of_single_level(row_sum, column_sum, ratio, w.least)
        bank = ESCAPES + (32 if in_kernel else 64)
        level, state, head = _level(reading, w.levels[index(j)], contexts, bank, w, state, head)
        if level == 0:
            return TOO_LARGE, sums, state, head
        if reading:
            w.indices[index(j)] = start + position
            w.levels[index(j)] = level
        j += 1
        sign = 1 if level > 0 else -1
        cell_signs += sign
        row_signs += sign
        row_sum += level
        if grid.rows > 1 and not in_kernel:
            w.column_sums[index(i)] += level
        w.kernel[index(slot)] = level
    for n in range(num_set):
        w.kernel[index(w.slots[index(w.positions[index(n)])])] = 0
    return DONE, (row_sum, row_signs), state, head


@part
def _level(reading, level, contexts, bank, w, state, head):
    """One level, which is not zero. Returns (level, state, head); 0 stands for one too large."""
    of_sign, of_magnitude = contexts
    negative, state = decide(reading, level < 0, of_sign, FAST, state, w.words, w.model)
    excess = 0 if reading else abs(np.int64(level)) - w.least
    if w.spread:
        excess, head = code_small_number(reading, excess, of_magnitude, head, w.tape, w.table)
        if excess >= ESCAPE:
            more = excess - ESCAPE
            more, state = code_number(reading, more, ESCAPES, bank, state, w.words, w.model)
            excess = ESCAPE + more if more >= 0 else MAX_LEVEL
        if excess > w.spread:
            return 0, state, head
    return -(excess + w.least) if negative else excess + w.least, state, head


write_walk, read_walk = _build_walk(reading=False), _build_walk(reading=True)
