"""Sparse integers in few bytes: the walk of a range coder through the updates of a network.

Positions, signs and magnitudes are coded as yes/no decisions (rangecoder.py) along a walk through
the layout. Each decision has a context, a probability that follows what was seen before in like
places: updates cluster by row, column and kernel, and the weights of a kernel mostly share their
sign.

One routine walks, compiled once to write and once to read, so that both ends make the same choices
by construction. It computes in integers only, so payloads are equal on every machine.
docs/wire-format.md specifies every bit.
"""

import numpy as np

from kernels import compiled
from rangecoder import (
    FAST,
    SLOW,
    check_end,
    clamp,
    code_number,
    decide,
    follow,
    index,
    inlined,
    log,
    new_model,
    read_varint,
    reading_state,
    varint,
    with_ending,
    writing_state,
)
from scan import as_grids, out_of_order, scan_order, scratch
from wire import Layout, PayloadError

MAX_LEVEL = 32767

# How many of these a prediction's excess over the least magnitude reaches.
NEARNESS = np.digitize(np.arange(64), [1, 2, 3, 5, 7, 10, 16, 26, 51]).astype(np.int64)

# Where each bank of contexts begins.
TENSORS = 0  # any[flat], copy[flat]
ROWS = 4  # 13 banks of 32: cells of a row; the first is shared by all rows
OCCUPIED = ROWS + 13 * 32  # 68 ratios of how many cells are due to how many are left
MASK = OCCUPIED + 68  # position in the kernel, set so far, left, above
SIGN = MASK + 16 * 8 * 4  # prediction, kernel, row
FLAT_SIGN = SIGN + 9 * 5 * 5  # row, column
NEIGHBOURS = FLAT_SIGN + 9 * 9  # 56 banks of 16: prediction and what follows, or occupancy
MEANS = NEIGHBOURS + 56 * 16  # 64 banks of 16: running means, size of the kernel's mask
NUM_CONTEXTS = MEANS + 64 * 16
ROW_SLOTS, MAGNITUDE_SLOTS = 12, 7  # lengths of a number that have a slot of their own

# What a walk returns: how it ended.
DONE, BAD_COPY, TOO_MANY, NO_ROOM, BAD_ROW, TOO_LARGE, TOO_FEW = range(7)
FAULTS = (
    "",
    "a copy of no tensor",
    "more values than announced",
    "the body ends early",
    "a row with more cells than columns",
    "a level that is too large",
    "fewer values than announced",
)


def encode_integers(indices: np.ndarray, levels: np.ndarray, layout: Layout) -> bytes:
    """Code the entries that are not zero of an integer vector [layout.size].

    indices: int64 [n], ascending, distinct, within the layout; levels: integers [n], not zero, at
    most MAX_LEVEL in magnitude. Raises ValueError for other levels.
    """
    if len(indices) == 0:
        return varint(0) + varint(1)
    magnitudes = np.abs(np.asarray(levels, np.int64))
    least = int(magnitudes.min())
    if least == 0 or magnitudes.max() > MAX_LEVEL:
        raise ValueError(f"levels must lie within 1..{MAX_LEVEL} in magnitude")
    tensors = as_grids(layout)
    scan = scan_order(tensors, indices.astype(np.int64), levels.astype(np.int16))
    num_words = 256 + len(indices) + 8 * int(tensors[:, 3].max())
    ending = NO_ROOM
    while ending == NO_ROOM:
        words = np.zeros(num_words, np.uint32)
        ending, state = _write(
            tensors, *scan, least, words, writing_state(), CONTEXTS.copy(), *scratch(tensors)
        )
        num_words *= 4
    if ending != DONE:
        raise ValueError(f"indices must be ascending and within the layout: {FAULTS[ending]}")
    return varint(len(indices)) + varint(least) + with_ending(words, state)


def decode_integers(body: bytes | memoryview, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return (indices: int64 [n], ascending; levels: int16 [n], not zero). Raises PayloadError.

    Takes 10 bytes for each announced value, of which there are no more than the layout has.
    """
    body = bytes(body)
    count, start = read_varint(body, 0)
    least, start = read_varint(body, start)
    if count > layout.size:
        raise PayloadError(f"{count} levels for a vector of {layout.size}")
    if not 1 <= least <= MAX_LEVEL:
        raise PayloadError(f"a least magnitude of {least} is not within 1..{MAX_LEVEL}")
    if count == 0:
        if len(body) > start:
            raise PayloadError("levels: bytes are left over after none")
        return np.zeros(0, np.int64), np.zeros(0, np.int16)
    body = body[start:]
    state, words = reading_state(body)
    tensors = as_grids(layout)
    indices, levels = np.empty(count, np.int64), np.zeros(count, np.int16)
    copies, bounds = np.zeros(len(tensors), np.int64), np.zeros(len(tensors) + 1, np.int64)
    scan = indices, levels, copies
    ending, state = _read(
        tensors, *scan, least, words, state, CONTEXTS.copy(), bounds, *scratch(tensors)[1:]
    )
    if ending != DONE:
        raise PayloadError(f"levels: {FAULTS[ending]}")
    check_end(body, state)
    for t in out_of_order(tensors):
        part = slice(bounds[t], bounds[t + 1])
        order = np.argsort(indices[part])
        indices[part], levels[part] = indices[part][order], levels[part][order]
    return indices, levels


def _initial_contexts() -> np.ndarray:
    """int64 [NUM_CONTEXTS]: what is likely before anything was seen."""
    probability = np.full(NUM_CONTEXTS, 32768, np.int64)
    count = np.zeros(NUM_CONTEXTS, np.int64)
    for ratio in range(68):  # 2^((ratio - 43) / 4), at most 0.8
        octave = (65536, 77936, 92682, 110218)[(ratio - 43) % 4]
        probability[OCCUPIED + ratio] = min(52429, octave >> max(0, (46 - ratio) // 4))
    count[OCCUPIED:MASK] = 6
    probability[MASK:SIGN] = np.tile((13107, 29491, 29491, 45875), 16 * 8)
    count[MASK:SIGN] = 4
    for c in range(9 * 5 * 5):
        score = 2 * (c // 25 - 4) + c // 5 % 5 - 2 + (c % 5 - 2) // 2
        other = 65536 // (1 + 2 ** abs(score))
        probability[SIGN + c] = other if score >= 0 else 65536 - other
    count[SIGN:FLAT_SIGN] = 3
    return new_model(probability, count)


CONTEXTS = _initial_contexts()


# --- contexts -------------------------------------------------------------------------------------


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
def _predict(kernel, k, kernel_width):
    """The level at k from those left, above and above left: by their plane, damped by 3/4."""
    left = kernel[index(k - 1)] if k % kernel_width else 0
    above = kernel[index(k - kernel_width)] if k >= kernel_width else 0
    if k % kernel_width and k >= kernel_width:
        return 3 * (left + above) - 2 * kernel[index(k - kernel_width - 1)] >> 2
    return left + above


@inlined
def _neighbours_after(kernel, k, kernel_size, kernel_width):
    """How many of the positions right of and below k are set; they still hold their mask bit."""
    right = k % kernel_width < kernel_width - 1 and kernel[index(k + 1)] != 0
    below = k + kernel_width < kernel_size and kernel[index(k + kernel_width)] != 0
    return (1 if right else 0) + (1 if below else 0)


# --- the walk -------------------------------------------------------------------------------------


@inlined
def _alike(tensors, s, t, bounds):
    """1 if tensor s has the rows, columns and kernel of t and holds something."""
    same = tensors[s, 1] == tensors[t, 1] and tensors[s, 2] == tensors[t, 2]
    return 1 if same and tensors[s, 3] == tensors[t, 3] and bounds[s + 1] > bounds[s] else 0


@inlined
def _occupied_cells(indices, j, begin, columns, stride, kernel_size):
    """Writing: how many cells of the row that begins at `begin` hold something, from entry j on."""
    cells, cell_end = 0, begin
    while j < len(indices) and indices[index(j)] < begin + (columns - 1) * stride + kernel_size:
        if indices[index(j)] >= cell_end:
            cell_end = begin + (indices[index(j)] - begin) // stride * stride + kernel_size
            if indices[index(j)] >= cell_end:  # between two columns of a matrix: another row's
                break
            cells += 1
        j += 1
    return cells


@inlined
def _mask(reading, indices, j, cell, size, kernel_width, kernel, state, words, model):
    """Which positions of a cell are set, into kernel as 0 or 1. Returns (how many, state)."""
    num_set = 0
    for k in range(size):
        bit = 1
        if num_set or k < size - 1:  # a cell holds something: the last one may be implied
            left = kernel[index(k - 1)] if k % kernel_width else 0
            above = kernel[index(k - kernel_width)] if k >= kernel_width else 0
            if not reading:
                next_one = j + num_set
                bit = 1 if next_one < len(indices) and indices[next_one] == cell + k else 0
            context = MASK + 32 * min(k, 15) + 4 * min(num_set, 7) + 2 * left + above
            bit, state = decide(reading, bit, context, FAST, state, words, model)
        kernel[index(k)] = bit
        num_set += bit
    return num_set, state


def _build_walk(reading):
    """The walk, compiled to write or to read: `reading` is a constant in it."""

    def walk(
        tensors,
        indices,
        levels,
        copies,
        least,
        words,
        state,
        model,
        bounds,
        column_cells,
        column_logs,
        column_sums,
        kernel,
    ):
        """Writing: indices, levels in scan order -> words. Reading: words -> indices, levels.

        bounds gets where each tensor's entries begin; the arrays after it are scratch (scratch).
        Returns (ending, state).
        """
        count, j = len(indices), 0
        for t in range(len(tensors)):
            offset, num_rows, num_columns = tensors[t, 0], tensors[t, 1], tensors[t, 2]
            size, kernel_width = tensors[t, 3], tensors[t, 4]
            row_stride, column_stride = tensors[t, 5], tensors[t, 6]
            flat = 1 if num_rows == 1 else 0
            bounds[t] = bounds[t + 1] = j
            if not reading and state[2] + 64 > len(words):
                return NO_ROOM, state

            # Does it hold anything, and is it the copy of an earlier tensor?
            end = offset + num_rows * num_columns * size
            bit = 1 if not reading and j < count and indices[index(j)] < end else 0
            bit, state = decide(reading, bit, TENSORS + flat, FAST, state, words, model)
            if bit == 0:
                continue
            num_alike = 0
            for s in range(t):
                num_alike += _alike(tensors, s, t, bounds)
            if num_alike:
                back = copies[t]
                bit, state = decide(
                    reading, back > 0, TENSORS + 2 + flat, FAST, state, words, model
                )
                if bit:
                    back, state = code_number(
                        reading, back - 1, ROW_SLOTS, ROWS, ROWS + 32, state, words, model
                    )
                    if back < 0 or back >= num_alike:
                        return BAD_COPY, state
                    s = t
                    while back >= 0:
                        s -= 1
                        back -= _alike(tensors, s, t, bounds)
                    num_copied = bounds[s + 1] - bounds[s]
                    if j + num_copied > count:
                        return TOO_MANY, state
                    if reading:
                        for e in range(num_copied):
                            indices[j + e] = indices[bounds[s] + e] - tensors[s, 0] + offset
                            levels[j + e] = levels[bounds[s] + e]
                    j += num_copied
                    bounds[t + 1] = j
                    continue

            for i in range(num_columns):
                column_cells[index(i)] = column_logs[index(i)] = column_sums[index(i)] = 0
            num_cells = 0
            tensor_mean, tensor_count = 0, 0  # running means are of 16 * (magnitude - least) + 1
            for o in range(num_rows):
                # The loop's guard: a payload that has ended is not walked to the layout's end.
                at = state[2]
                if reading and at > len(words) + 2 or not reading and at + 64 > len(words):
                    return NO_ROOM, state
                row = offset + o * row_stride
                due = 0
                if not reading:
                    due = _occupied_cells(indices, j, row, num_columns, column_stride, size)
                bank = ROWS + 32 + 32 * min(log((num_cells // o if o else 0) + 1) >> 1, 11)
                due, state = code_number(reading, due, ROW_SLOTS, ROWS, bank, state, words, model)
                if due < 0 or due > num_columns:
                    return BAD_ROW, state
                if due == 0:
                    continue
                ahead = num_cells  # cells of the rows before, in this column and those to its right
                log_due = log(due)
                row_mean, row_count, row_sum, row_signs = tensor_mean, 0, 0, 0
                i = -1
                while due:
                    # To the next occupied cell: a loop of its own, so that registers hold it all.
                    occupied = 0
                    while not occupied:
                        i += 1
                        left = num_columns - i
                        ratio = log_due + column_logs[index(i)] - log(2 * ahead + left) + 44
                        ratio = clamp(ratio, 0, 67)
                        ahead -= column_cells[index(i)]
                        occupied = 1
                        if due < left:
                            if not reading:
                                end_of_cell = row + i * column_stride + size
                                occupied = 1 if indices[index(j)] < end_of_cell else 0
                            occupied, state = decide(
                                reading, occupied, OCCUPIED + ratio, SLOW, state, words, model
                            )
                    cell = row + i * column_stride
                    due -= 1
                    log_due = log(due)
                    num_cells += 1
                    column_cells[index(i)] += 1
                    column_logs[index(i)] = log(2 * column_cells[index(i)] + 1)
                    if not reading and state[2] + 64 + 8 * size > len(words):
                        return NO_ROOM, state
                    num_set, state = _mask(
                        reading, indices, j, cell, size, kernel_width, kernel, state, words, model
                    )
                    if j + num_set > count:
                        return TOO_MANY, state

                    first, kernel_mean, kernel_signs = j, tensor_mean, 0
                    for k in range(size):
                        if kernel[index(k)] == 0:
                            continue
                        level = np.int64(levels[index(j)])
                        if size > 1:
                            predicted = _predict(kernel, k, kernel_width)
                            near = _nearness(predicted, least)
                            after = _neighbours_after(kernel, k, size, kernel_width)
                            side = min(near, 4) if predicted > 0 else -min(near, 4)
                            signs = 5 * clamp(kernel_signs, -2, 2) + clamp(row_signs, -2, 2)
                            sign_context = SIGN + 25 * (side + 4) + signs + 12
                            a = NEIGHBOURS + 16 * (3 * near + after)
                            means = min(log(kernel_mean) + log(row_mean) >> 2, 15)
                            b = MEANS + 16 * (4 * means + min(num_set // 3, 3))
                        else:
                            row_size = _size_of_sum(row_sum, least)
                            column_size = _size_of_sum(column_sums[index(i)], least)
                            sign_context = FLAT_SIGN + 9 * (row_size + 4) + column_size + 4
                            a = NEIGHBOURS + 16 * (36 + ratio // 4)
                            b = MEANS + 16 * (4 * min(log(row_mean) >> 1, 15) + 3)
                        negative, state = decide(
                            reading, level < 0, sign_context, FAST, state, words, model
                        )
                        excess, state = code_number(
                            reading, abs(level) - least, MAGNITUDE_SLOTS, a, b, state, words, model
                        )
                        if excess < 0 or excess > MAX_LEVEL - least:
                            return TOO_LARGE, state
                        level = -(excess + least) if negative else excess + least
                        if reading:
                            indices[index(j)] = cell + k
                            levels[index(j)] = level
                        kernel[index(k)] = level
                        kernel_signs += 1 - 2 * negative
                        row_signs += 1 - 2 * negative
                        row_sum += level
                        column_sums[index(i)] += level
                        value = 16 * excess + 1
                        kernel_mean = follow(kernel_mean, value, j - first, 1)
                        row_mean = follow(row_mean, value, row_count, 4)
                        tensor_mean = follow(tensor_mean, value, tensor_count, 5)
                        row_count += 1
                        tensor_count += 1
                        j += 1
            bounds[t + 1] = j
        return DONE if j == count else TOO_FEW, state

    return compiled(walk)


_write, _read = _build_walk(reading=False), _build_walk(reading=True)
