"""Sparse integers in few bytes: a walk through the updates of a network, with two coders.

Along a walk through the layout, which cells hold something and the signs are coded as yes/no
decisions (rangecoder.py), the places within a kernel and the magnitudes as symbols (rans.py). Each
has a context that follows what was seen before in like places: updates cluster by row, column and
kernel, and the weights of a kernel mostly share their sign.

One routine walks, compiled once to write and once to read, so that both ends make the same choices
by construction. It computes in integers only, so payloads are equal on every machine.
docs/wire-format.md specifies every bit.
"""

import numpy as np

from compiled import compiled, index, inlined
from layout import Layout
from wire.container import PayloadError
from wire.contexts import (
    ESCAPES,
    FIRST_DECISIONS,
    FIRST_SYMBOLS,
    MASK,
    OCCUPIED,
    ROWS,
    TENSORS,
    of_kernel_level,
    of_single_level,
)
from wire.range_coder import (
    FAST,
    SLOW,
    check_end,
    clamp,
    code_number,
    decide,
    log,
    read_varint,
    reading_state,
    varint,
    with_ending,
    writing_state,
)
from wire.rans import ESCAPE, code_small_number, code_symbol, is_spent, new_table, push_all
from wire.scan import as_grids, new_scratch, out_of_order, scan_order

MAX_LEVEL = 32767

# What a walk returns: how it ended.
DONE, BAD_COPY, TOO_MANY, NO_ROOM, BAD_ROW, BAD_CELL, TOO_LARGE, TOO_FEW = range(8)
FAULTS = (
    "",
    "a copy of no tensor",
    "more values than announced",
    "the body ends early",
    "a row with more cells than columns",
    "a cell with no positions or others than it has",
    "a level that is too large",
    "fewer values than announced",
)


def encode_integers(indices: np.ndarray, levels: np.ndarray, layout: Layout) -> bytes:
    """Code the entries that are not zero of an integer vector [layout.size].

    indices: int64 [n], ascending, distinct, within the layout; levels: integers [n], not zero, at
    most MAX_LEVEL in magnitude. Raises ValueError for other levels.
    """
    if len(indices) == 0:
        return varint(0)
    magnitudes = np.abs(np.asarray(levels, np.int64))
    least, spread = int(magnitudes.min()), int(np.ptp(magnitudes))
    if least == 0 or least + spread > MAX_LEVEL:
        raise ValueError(f"levels must lie within 1..{MAX_LEVEL} in magnitude")
    tensors = as_grids(layout)
    scan = scan_order(tensors, indices.astype(np.int64), levels.astype(np.int16))
    num_words = 256 + 4 * len(indices) + 8 * int(tensors[:, 3].max())
    ending = NO_ROOM
    while ending == NO_ROOM:
        words, tape = np.zeros(num_words, np.uint32), np.empty(num_words, np.uint64)
        decisions = words, writing_state(), FIRST_DECISIONS.copy()
        symbols = tape, (np.uint64(0), 0), new_table(FIRST_SYMBOLS)
        ending, state, head = _write(
            tensors, *scan, least, spread, decisions, symbols, new_scratch(tensors)
        )
        num_words *= 4
    if ending != DONE:
        raise ValueError(f"indices must be ascending and within the layout: {FAULTS[ending]}")
    code = with_ending(words, state)
    x, rest = push_all(tape[: head[1]])
    numbers = len(indices), least, spread, len(code), x
    return b"".join(map(varint, numbers)) + code + rest


def decode_integers(body: bytes | memoryview, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return (indices: int64 [n], ascending; levels: int16 [n], not zero). Raises PayloadError.

    Takes 10 bytes for each announced value, of which there are no more than the layout has.
    """
    body = bytes(body)
    count, start = read_varint(body, 0)
    if count > layout.size:
        raise PayloadError(f"{count} levels for a vector of {layout.size}")
    if count == 0:
        if len(body) > start:
            raise PayloadError("levels: bytes are left over after none")
        return np.zeros(0, np.int64), np.zeros(0, np.int16)
    least, start = read_varint(body, start)
    spread, start = read_varint(body, start)
    if not 1 <= least <= MAX_LEVEL - spread:
        raise PayloadError(
            f"magnitudes of {least} to {least + spread} are not within 1..{MAX_LEVEL}"
        )
    length, start = read_varint(body, start)
    x, start = read_varint(body, start)
    code, rest = body[start : start + length], body[start + length :]
    if len(code) < length or len(rest) % 4:
        raise PayloadError("levels: the body ends early, or within a word")
    tensors = as_grids(layout)
    indices, levels = np.empty(count, np.int64), np.zeros(count, np.int16)
    copies, scratch = np.zeros(len(tensors), np.int64), new_scratch(tensors)
    state, words = reading_state(code)
    decisions = words, state, FIRST_DECISIONS.copy()
    tape = np.frombuffer(rest, ">u4").astype(np.uint32)
    symbols = tape, (np.uint64(x), 0), new_table(FIRST_SYMBOLS)
    ending, state, head = _read(
        tensors, indices, levels, copies, least, spread, decisions, symbols, scratch
    )
    if ending != DONE:
        raise PayloadError(f"levels: {FAULTS[ending]}")
    check_end(code, state)
    if not is_spent(head, tape):
        raise PayloadError("levels: words are left over, or others than an encoder ends with")
    bounds = scratch[0]
    for t in out_of_order(layout):
        part = slice(bounds[t], bounds[t + 1])
        order = np.argsort(indices[part])
        indices[part], levels[part] = indices[part][order], levels[part][order]
    return indices, levels


# --- the walk -------------------------------------------------------------------------------------


@inlined
def _alike(tensors, s, t, bounds):
    """1 if tensor s has the rows, columns and kernel of t and holds something."""
    same = tensors[s, 1] == tensors[t, 1] and tensors[s, 2] == tensors[t, 2]
    return 1 if same and tensors[s, 3] == tensors[t, 3] and bounds[s + 1] > bounds[s] else 0


@inlined
def _is_full(words, state, tape, head, size):
    """Writing: whether a kernel of that size may need more room than is left."""
    most = 64 + 8 * size
    return state[2] + most > len(words) or head[1] + most > len(tape)


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
def _mask(reading, indices, j, cell, size, width, positions, patterns, tape, head, table):
    """The positions of a cell that are set, three of a row at a time. Returns (number, head).

    The number is 0 if one is set that is not there. patterns keeps a row's, [width].
    """
    num_set, before, row, column = 0, 0, 0, 0
    while row * width < size:
        first, num_there, pattern = row * width + column, min(width - column, 3), 0
        if not reading:
            for k in range(num_there):
                next_one = j + num_set + (pattern & 1) + (pattern >> 1)
                if next_one < len(indices) and indices[next_one] == cell + first + k:
                    pattern |= 1 << k
        above = before  # it is, in a kernel three wide
        if width > 3:
            above = patterns[index(column)] if row else 0
        context = MASK + 32 * min(row, 2) + 4 * above
        context += 96 + (before >> 1) if column else min(num_set, 3)
        pattern, head = code_symbol(reading, pattern, context, head, tape, table)
        if pattern >> num_there:  # at once: more of them would not fit into positions
            return 0, head
        for k in range(3):
            positions[index(num_set)] = first + k
            num_set += pattern >> k & 1
        before = pattern
        patterns[index(column)] = before
        column += 3
        if column >= width:
            row, column = row + 1, 0
    return num_set, head


def _build_walk(reading):
    """The walk, compiled to write or to read: `reading` is a constant in it."""

    def walk(
        tensors,
        indices,
        levels,
        copies,
        least,
        spread,
        decisions,
        symbols,
        scratch,
    ):
        """Writing: indices, levels in scan order -> words and tape. Reading: the reverse.

        decisions are the words, state and model of rangecoder.py, symbols the tape, head and table
        of rans.py. Of the scratch (scan.py), bounds gets where each tensor's entries begin.
        Returns (ending, state, head).
        """
        words, state, model = decisions
        tape, head, table = symbols
        bounds, column_cells, column_logs, column_sums, kernel, slots, positions, patterns = scratch
        count, j = len(indices), 0
        for t in range(len(tensors)):
            offset, num_rows, num_columns = tensors[t, 0], tensors[t, 1], tensors[t, 2]
            size, kernel_width = tensors[t, 3], tensors[t, 4]
            row_stride, column_stride = tensors[t, 5], tensors[t, 6]
            flat = 1 if num_rows == 1 else 0
            bounds[t] = bounds[t + 1] = j
            if not reading and _is_full(words, state, tape, head, 0):
                return NO_ROOM, state, head

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
                        reading, back - 1, ROWS, ROWS + 32, state, words, model
                    )
                    if back < 0 or back >= num_alike:
                        return BAD_COPY, state, head
                    s = t
                    while back >= 0:
                        s -= 1
                        back -= _alike(tensors, s, t, bounds)
                    num_copied = bounds[s + 1] - bounds[s]
                    if j + num_copied > count:
                        return TOO_MANY, state, head
                    if reading:
                        for e in range(num_copied):
                            indices[j + e] = indices[bounds[s] + e] - tensors[s, 0] + offset
                            levels[j + e] = levels[bounds[s] + e]
                    j += num_copied
                    bounds[t + 1] = j
                    continue

            for i in range(num_columns):
                column_cells[index(i)] = column_logs[index(i)] = column_sums[index(i)] = 0
            for k in range(size):  # a kernel's slots: its levels, with zeros left and above
                slots[index(k)] = (
                    (k // kernel_width + 1) * (kernel_width + 1) + k % kernel_width + 1
                )
            num_cells = 0
            for o in range(num_rows):
                # The loop's guard: a payload that has ended is not walked to the layout's end.
                ended = reading and state[2] > len(words) + 2
                if ended or not reading and _is_full(words, state, tape, head, 0):
                    return NO_ROOM, state, head
                row = offset + o * row_stride
                due = 0
                if not reading:
                    due = _occupied_cells(indices, j, row, num_columns, column_stride, size)
                bank = ROWS + 32 + 32 * min(log((num_cells // o if o else 0) + 1) >> 1, 11)
                due, state = code_number(reading, due, ROWS, bank, state, words, model)
                if due < 0 or due > num_columns:
                    return BAD_ROW, state, head
                if due == 0:
                    continue
                ahead = num_cells  # cells of the rows before, in this column and those to its right
                log_due = log(due)
                row_sum, row_signs = 0, 0
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
                    if not reading and _is_full(words, state, tape, head, size):
                        return NO_ROOM, state, head
                    num_set, positions[0] = 1, 0
                    if size > 1:
                        num_set, head = _mask(
                            reading,
                            indices,
                            j,
                            cell,
                            size,
                            kernel_width,
                            positions,
                            patterns,
                            tape,
                            head,
                            table,
                        )
                        if num_set == 0:
                            return BAD_CELL, state, head
                    if j + num_set > count:
                        return TOO_MANY, state, head

                    kernel_signs = 0
                    for n in range(num_set):
                        k = positions[index(n)]
                        if size > 1:
                            sign, magnitude = of_kernel_level(
                                kernel,
                                slots[index(k)],
                                kernel_width,
                                num_set,
                                kernel_signs,
                                row_signs,
                                least,
                            )
                        else:
                            sign, magnitude = of_single_level(
                                row_sum, column_sums[index(i)], ratio, least
                            )
                        level = np.int64(levels[index(j)])
                        negative, state = decide(
                            reading, level < 0, sign, FAST, state, words, model
                        )
                        excess = 0 if reading else abs(level) - least
                        if spread:
                            excess, head = code_small_number(
                                reading, excess, magnitude, head, tape, table
                            )
                            if excess >= ESCAPE:
                                bank = ESCAPES + (32 if size > 1 else 64)
                                more, state = code_number(
                                    reading, excess - ESCAPE, ESCAPES, bank, state, words, model
                                )
                                excess = ESCAPE + more if more >= 0 else MAX_LEVEL
                            if excess > spread:
                                return TOO_LARGE, state, head
                        level = -(excess + least) if negative else excess + least
                        if reading:
                            indices[index(j)] = cell + k
                            levels[index(j)] = level
                        kernel[index(slots[index(k)])] = level
                        kernel_signs += 1 - 2 * negative
                        row_signs += 1 - 2 * negative
                        row_sum += level
                        column_sums[index(i)] += level
                        j += 1
                    for n in range(num_set):
                        kernel[index(slots[index(positions[index(n)])])] = 0
            bounds[t + 1] = j
        return DONE if j == count else TOO_FEW, state, head

    return compiled(walk)


_write, _read = _build_walk(reading=False), _build_walk(reading=True)
