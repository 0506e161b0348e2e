"""Sparse integers in few bytes: an adaptive binary range coder for updates of a network.

Positions, signs and magnitudes are coded as yes/no decisions along a walk through the layout. Each
decision has a context, a probability that follows what was seen before in like places: updates
cluster by row, column and kernel, and the weights of a kernel mostly share their sign. The range
coder is that of Martin 1979, with carries; the binary contexts are as in CABAC (Marpe et al. 2003).

One routine walks, compiled once to write and once to read, so that both ends make the same choices
by construction. It computes in integers only, so payloads are equal on every machine.
docs/wire-format.md specifies every bit.

Shorthand of the kernels below: `state` is the triple (point, width, at): width is the range; point
is its low end (writing), or the code minus its low end (reading); at is the next of the `words`,
uint32 [num_words]. `model` is int64 [NUM_CONTEXTS]: 256 * probability of a one / 65536 + count.
"""

from functools import lru_cache

import numpy as np
from numba import njit

from wire import Layout, PayloadError

MAX_LEVEL = 32767
EVEN = np.uint64(32768)  # one half, in 1/65536
LEAST_PROBABILITY, LARGEST_PROBABILITY = 32, 65504
FAST, SLOW = 62, 126  # where a context's count stops: it then moves by 1/64 or 1/128 a decision
RATES = np.array([65536 // (count + 2) for count in range(SLOW + 1)], np.int64)

# 4 * log2(n), rounded down to what the four bits after the leading one tell.
QUARTERS = (0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3)
LOGARITHMS = np.array(
    [0]
    + [
        4 * (n.bit_length() - 1) + QUARTERS[n << 4 >> n.bit_length() - 1 & 15]
        for n in range(1, 4096)
    ],
    np.int64,
)
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


def _compiled(function, **options):
    """numba's machine code; the first use compiles for some seconds, and later runs load it.

    Without reference counting, which would cost ten times the coding: kernels allocate nothing.
    """
    options |= {"_nrt": False, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither __pycache__ nor the user's cache folder can be written
        return njit(**options)(function)


def _inlined(function):
    """A part of the walk: LLVM inlines it, so that `reading` and the state cost nothing."""
    return _compiled(function, forceinline=True)


def encode_integers(indices: np.ndarray, levels: np.ndarray, layout: Layout) -> bytes:
    """Code the entries that are not zero of an integer vector [layout.size].

    indices: int64 [n], ascending, distinct, within the layout; levels: integers [n], not zero, at
    most MAX_LEVEL in magnitude. Raises ValueError for other levels.
    """
    if len(indices) == 0:
        return _varint(0) + _varint(1)
    magnitudes = np.abs(np.asarray(levels, np.int64))
    least = int(magnitudes.min())
    if least == 0 or magnitudes.max() > MAX_LEVEL:
        raise ValueError(f"levels must lie within 1..{MAX_LEVEL} in magnitude")
    tensors = _tensors(layout)
    scan = _scan_order(tensors, indices.astype(np.int64), levels.astype(np.int16))
    num_words = 256 + len(indices) + 8 * int(tensors[:, 3].max())
    ending = NO_ROOM
    while ending == NO_ROOM:
        words = np.zeros(num_words, np.uint32)
        state = np.uint64(0), np.uint64(2**64 - 1), 0
        ending, point, width, at = _write(
            tensors, *scan, least, words, *state, CONTEXTS.copy(), *_room(tensors)
        )
        num_words *= 4
    if ending != DONE:
        raise ValueError(f"indices must be ascending and within the layout: {FAULTS[ending]}")
    return _varint(len(indices)) + _varint(least) + _with_ending(words[:at], int(point), int(width))


def decode_integers(body: bytes | memoryview, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return (indices: int64 [n], ascending; levels: int16 [n], not zero). Raises PayloadError.

    Takes 10 bytes for each announced value, of which there are no more than the layout has.
    """
    body = bytes(body)
    count, start = _read_varint(body, 0)
    least, start = _read_varint(body, start)
    if count > layout.size:
        raise PayloadError(f"{count} levels for a vector of {layout.size}")
    if not 1 <= least <= MAX_LEVEL:
        raise PayloadError(f"a least magnitude of {least} is not within 1..{MAX_LEVEL}")
    if count == 0:
        if len(body) > start:
            raise PayloadError("levels: bytes are left over after none")
        return np.zeros(0, np.int64), np.zeros(0, np.int16)
    body = body[start:]
    words = np.frombuffer(body + bytes(-len(body) % 4), ">u4").astype(np.uint32)
    code = int.from_bytes(body[:8].ljust(8, b"\0"), "big")
    tensors = _tensors(layout)
    indices, levels = np.empty(count, np.int64), np.zeros(count, np.int16)
    copies, bounds = np.zeros(len(tensors), np.int64), np.zeros(len(tensors) + 1, np.int64)
    state = np.uint64(code), np.uint64(2**64 - 1), 2
    scan = indices, levels, copies
    ending, point, width, at = _read(
        tensors, *scan, least, words, *state, CONTEXTS.copy(), bounds, *_room(tensors)[1:]
    )
    if ending != DONE:
        raise PayloadError(f"levels: {FAULTS[ending]}")
    _check_end(body, int(point), int(width), at)
    for t in _out_of_order(tensors):
        part = slice(bounds[t], bounds[t + 1])
        order = np.argsort(indices[part])
        indices[part], levels[part] = indices[part][order], levels[part][order]
    return indices, levels


# --- the layout as the walk sees it ---------------------------------------------------------------


@lru_cache(maxsize=16)
def _tensors(layout: Layout) -> np.ndarray:
    """int64 [num_tensors, 7]: offset, rows, columns, kernel, its width, row and column stride."""
    return np.array(
        [
            (offset, *_grid(shape, int(size)))
            for offset, shape, size in zip(
                layout.offsets[:-1], layout.shapes, layout.sizes, strict=True
            )
        ],
        np.int64,
    ).reshape(-1, 7)


def _grid(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """A tensor as rows of columns of kernels; a matrix [outputs, inputs] has a row per input."""
    if len(shape) < 2:
        return 1, size, 1, 1, size, 1
    if len(shape) == 2:
        return shape[1], shape[0], 1, 1, 1, shape[1]
    kernel = int(np.prod(shape[2:]))
    return shape[0], shape[1], kernel, shape[-1], shape[1] * kernel, kernel


def _by_columns(tensors: np.ndarray) -> np.ndarray:
    """bool [num_tensors]: the walk goes through it in another order than the vector's."""
    return (tensors[:, 5] < tensors[:, 6]) & (tensors[:, 1] > 1)


def _out_of_order(tensors: np.ndarray) -> list[int]:
    """Tensors that are walked by columns, and those that could be a copy of one."""
    grids = set(map(tuple, tensors[_by_columns(tensors), 1:4].tolist()))
    return [t for t, grid in enumerate(tensors[:, 1:4].tolist()) if tuple(grid) in grids]


def _room(tensors: np.ndarray) -> tuple[np.ndarray, ...]:
    """What a walk writes on: int64 [num_tensors + 1], three of [columns], one of [kernel]."""
    columns, kernel = int(tensors[:, 2].max(initial=1)), int(tensors[:, 3].max(initial=1))
    sizes = len(tensors) + 1, columns, columns, columns, kernel
    return tuple(np.zeros(size, np.int64) for size in sizes)


def _scan_order(tensors: np.ndarray, indices: np.ndarray, levels: np.ndarray):
    """Return (indices, levels, copies): the first two as the walk meets them, sorted in place.

    copies[t], int64 [num_tensors], is 0, or tensor t equals that of its shape which lies so many
    back, not counting empty ones. (Shortcuts and the layers beside them get equal biases.)
    """
    bounds = [*np.searchsorted(indices, tensors[:, 0]).tolist(), len(indices)]
    by_columns = _by_columns(tensors)
    copies = np.zeros(len(tensors), np.int64)
    num_alike, last_equal = {}, {}
    for t, (offset, rows, columns, kernel, _, _, stride) in enumerate(tensors.tolist()):
        part = slice(bounds[t], bounds[t + 1])
        if part.start == part.stop:
            continue
        if by_columns[t]:
            inside = indices[part] - offset
            order = np.argsort(inside % stride * columns + inside // stride)
            indices[part], levels[part] = indices[part][order], levels[part][order]
        shape = rows, columns, kernel
        rank = num_alike[shape] = num_alike.get(shape, 0) + 1
        content = shape, (indices[part] - offset).tobytes(), levels[part].tobytes()
        copies[t] = rank - last_equal.get(content, rank)
        last_equal[content] = rank
    return indices, levels, copies


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
    return 256 * np.clip(probability, LEAST_PROBABILITY, LARGEST_PROBABILITY) + count


CONTEXTS = _initial_contexts()


# --- one decision ---------------------------------------------------------------------------------


@_inlined
def _narrow(reading, bit, probability, point, width, at, words):
    """One decision, a one having probability / 65536 of the range. Returns (bit, *state)."""
    ones = (width >> np.uint64(16)) * probability
    if reading:
        bit = 1 if point < ones else 0
    if bit:
        width = ones
    else:
        width -= ones
        if reading:
            point -= ones
        else:
            point += ones
            if point < ones:  # a carry into the words already written
                j = at - 1
                while words[j] == 0xFFFFFFFF:
                    words[j] = 0
                    j -= 1
                words[j] += np.uint32(1)
    if width < np.uint64(1 << 32):
        width <<= np.uint64(32)
        if reading:  # past the end there are zeros
            word = np.uint64(words[at]) if at < len(words) else np.uint64(0)
            point = point << np.uint64(32) | word
        else:
            words[at] = np.uint32(point >> np.uint64(32))
            point <<= np.uint64(32)
        at += 1
    return bit, point, width, at


@_inlined
def _learn(bit, context, last, model):
    """Move the context's probability towards the bit, by 1 / (count + 2)."""
    count, probability = model[context] & 255, model[context] >> 8
    goal = LARGEST_PROBABILITY if bit else LEAST_PROBABILITY
    probability += (goal - probability) * RATES[count] >> 16
    model[context] = probability << 8 | count + (count < last)


@_inlined
def _decide(reading, bit, context, last, point, width, at, words, model):
    """A decision in one context. Returns (bit, *state)."""
    probability = np.uint64(model[context] >> 8)
    bit, point, width, at = _narrow(reading, bit, probability, point, width, at, words)
    _learn(bit, context, last, model)
    return bit, point, width, at


@_inlined
def _decide_by_two(reading, bit, a, b, point, width, at, words, model):
    """A decision with the mean of two contexts' probabilities. Returns (bit, *state)."""
    probability = np.uint64((model[a] >> 8) + (model[b] >> 8) >> 1)
    bit, point, width, at = _narrow(reading, bit, probability, point, width, at, words)
    _learn(bit, a, FAST, model)
    _learn(bit, b, FAST, model)
    return bit, point, width, at


@_inlined
def _number(reading, number, slots, a, b, point, width, at, words, model):
    """number >= 0 as Elias' gamma code of number + 1, with contexts from the banks at a and b.

    The length is in unary; of the bits below the leading one only the first is modelled. Returns
    (number, *state); number is -1 if it is longer than any there is.
    """
    length = 0
    if not reading:
        while number + 1 >> length + 1:
            length += 1
    m = 0
    while True:
        go_on, slot = 1 if m < length else 0, min(m, slots)
        go_on, point, width, at = _decide_by_two(
            reading, go_on, a + slot, b + slot, point, width, at, words, model
        )
        if go_on == 0:
            break
        m += 1
        if m > 30:
            return -1, point, width, at
    value = 1
    for j in range(m - 1, -1, -1):
        bit = number + 1 >> j & 1
        if j == m - 1:
            slot = slots + min(m, slots)
            bit, point, width, at = _decide_by_two(
                reading, bit, a + slot, b + slot, point, width, at, words, model
            )
        else:
            bit, point, width, at = _narrow(reading, bit, EVEN, point, width, at, words)
        value = value * 2 + bit
    return value - 1, point, width, at


# --- contexts -------------------------------------------------------------------------------------


@_inlined
def _log(n):
    """4 * log2(n), see LOGARITHMS; 0 for 0. n < 2^36."""
    if n < 1 << 12:
        return LOGARITHMS[n]
    if n < 1 << 20:
        return LOGARITHMS[n >> 8] + 32
    if n < 1 << 28:
        return LOGARITHMS[n >> 16] + 64
    return LOGARITHMS[n >> 24] + 96


@_inlined
def _clamp(v, low, high):
    return low if v < low else high if v > high else v


@_inlined
def _size_of_sum(total, least):
    """A sum of levels as -4..4, in units of the least magnitude."""
    a = abs(total)
    size = 0 if a == 0 else 1 if a < least else 2 if a < 3 * least else 3 if a < 8 * least else 4
    return -size if total < 0 else size


@_inlined
def _nearness(predicted, least):
    """A predicted level as 0..11: far below the least magnitude to far above it."""
    a = abs(predicted)
    if a < least:
        return 0 if a == 0 else 1 if 2 * a < least else 2
    return 2 + NEARNESS[min(a - least + 1, 63)]


@_inlined
def _predict(kernel, k, kernel_width):
    """The level at k from those left, above and above left: by their plane, damped by 3/4."""
    left = kernel[k - 1] if k % kernel_width else 0
    above = kernel[k - kernel_width] if k >= kernel_width else 0
    if k % kernel_width and k >= kernel_width:
        return 3 * (left + above) - 2 * kernel[k - kernel_width - 1] >> 2
    return left + above


@_inlined
def _neighbours_after(kernel, k, kernel_size, kernel_width):
    """How many of the positions right of and below k are set; they still hold their mask bit."""
    right = k % kernel_width < kernel_width - 1 and kernel[k + 1] != 0
    below = k + kernel_width < kernel_size and kernel[k + kernel_width] != 0
    return (1 if right else 0) + (1 if below else 0)


@_inlined
def _follow(mean, value, count, slowest):
    """A running mean after `count` values: 1 / 2^count of the way, at least 1 / 2^slowest."""
    return value if count == 0 else mean + (value - mean >> min(count, slowest))


# --- the walk -------------------------------------------------------------------------------------


@_inlined
def _alike(tensors, s, t, bounds):
    """1 if tensor s has the rows, columns and kernel of t and holds something."""
    same = tensors[s, 1] == tensors[t, 1] and tensors[s, 2] == tensors[t, 2]
    return 1 if same and tensors[s, 3] == tensors[t, 3] and bounds[s + 1] > bounds[s] else 0


@_inlined
def _occupied_cells(indices, j, begin, columns, stride, kernel_size):
    """Writing: how many cells of the row that begins at `begin` hold something, from entry j on."""
    cells, cell_end = 0, begin
    while j < len(indices) and indices[j] < begin + (columns - 1) * stride + kernel_size:
        if indices[j] >= cell_end:
            cell_end = begin + (indices[j] - begin) // stride * stride + kernel_size
            if indices[j] >= cell_end:  # between two columns of a matrix: another row's
                break
            cells += 1
        j += 1
    return cells


@_inlined
def _mask(reading, indices, j, cell, size, kernel_width, kernel, point, width, at, words, model):
    """Which positions of a cell are set, into kernel as 0 or 1. Returns (how many, *state)."""
    num_set = 0
    for k in range(size):
        bit = 1
        if num_set or k < size - 1:  # a cell holds something: the last one may be implied
            left = kernel[k - 1] if k % kernel_width else 0
            above = kernel[k - kernel_width] if k >= kernel_width else 0
            if not reading:
                next_one = j + num_set
                bit = 1 if next_one < len(indices) and indices[next_one] == cell + k else 0
            context = MASK + 32 * min(k, 15) + 4 * min(num_set, 7) + 2 * left + above
            bit, point, width, at = _decide(
                reading, bit, context, FAST, point, width, at, words, model
            )
        kernel[k] = bit
        num_set += bit
    return num_set, point, width, at


def _build_walk(reading):
    """The walk, compiled to write or to read: `reading` is a constant in it."""

    def walk(
        tensors,
        indices,
        levels,
        copies,
        least,
        words,
        point,
        width,
        at,
        model,
        bounds,
        column_cells,
        column_logs,
        column_sums,
        kernel,
    ):
        """Writing: indices, levels in scan order -> words. Reading: words -> indices, levels.

        bounds gets where each tensor's entries begin; the arrays after it are scratch (_room).
        Returns (ending, *state).
        """
        count, j = len(indices), 0
        for t in range(len(tensors)):
            offset, num_rows, num_columns = tensors[t, 0], tensors[t, 1], tensors[t, 2]
            size, kernel_width = tensors[t, 3], tensors[t, 4]
            row_stride, column_stride = tensors[t, 5], tensors[t, 6]
            flat = 1 if num_rows == 1 else 0
            bounds[t] = bounds[t + 1] = j
            if not reading and at + 64 > len(words):
                return NO_ROOM, point, width, at

            # Does it hold anything, and is it the copy of an earlier tensor?
            end = offset + num_rows * num_columns * size
            bit = 1 if not reading and j < count and indices[j] < end else 0
            bit, point, width, at = _decide(
                reading, bit, TENSORS + flat, FAST, point, width, at, words, model
            )
            if bit == 0:
                continue
            num_alike = 0
            for s in range(t):
                num_alike += _alike(tensors, s, t, bounds)
            if num_alike:
                back = copies[t]
                bit, point, width, at = _decide(
                    reading, back > 0, TENSORS + 2 + flat, FAST, point, width, at, words, model
                )
                if bit:
                    back, point, width, at = _number(
                        reading,
                        back - 1,
                        ROW_SLOTS,
                        ROWS,
                        ROWS + 32,
                        point,
                        width,
                        at,
                        words,
                        model,
                    )
                    if back < 0 or back >= num_alike:
                        return BAD_COPY, point, width, at
                    s = t
                    while back >= 0:
                        s -= 1
                        back -= _alike(tensors, s, t, bounds)
                    num_copied = bounds[s + 1] - bounds[s]
                    if j + num_copied > count:
                        return TOO_MANY, point, width, at
                    if reading:
                        for e in range(num_copied):
                            indices[j + e] = indices[bounds[s] + e] - tensors[s, 0] + offset
                            levels[j + e] = levels[bounds[s] + e]
                    j += num_copied
                    bounds[t + 1] = j
                    continue

            for i in range(num_columns):
                column_cells[i] = column_logs[i] = column_sums[i] = 0
            num_cells = 0
            tensor_mean, tensor_count = 0, 0  # running means are of 16 * (magnitude - least) + 1
            for o in range(num_rows):
                # The loop's guard: a payload that has ended is not walked to the layout's end.
                if reading and at > len(words) + 2 or not reading and at + 64 > len(words):
                    return NO_ROOM, point, width, at
                row = offset + o * row_stride
                due = 0
                if not reading:
                    due = _occupied_cells(indices, j, row, num_columns, column_stride, size)
                bank = ROWS + 32 + 32 * min(_log((num_cells // o if o else 0) + 1) >> 1, 11)
                due, point, width, at = _number(
                    reading, due, ROW_SLOTS, ROWS, bank, point, width, at, words, model
                )
                if due < 0 or due > num_columns:
                    return BAD_ROW, point, width, at
                if due == 0:
                    continue
                ahead = num_cells  # cells of the rows before, in this column and those to its right
                log_due = _log(due)
                row_mean, row_count, row_sum, row_signs = tensor_mean, 0, 0, 0
                for i in range(num_columns):
                    left = num_columns - i
                    ratio = log_due + column_logs[i] - _log(2 * ahead + left) + 44
                    ratio = _clamp(ratio, 0, 67)
                    ahead -= column_cells[i]
                    cell = row + i * column_stride
                    bit = 1
                    if due < left:
                        if not reading:
                            bit = 1 if indices[j] < cell + size else 0
                        bit, point, width, at = _decide(
                            reading, bit, OCCUPIED + ratio, SLOW, point, width, at, words, model
                        )
                    if bit == 0:
                        continue
                    due -= 1
                    log_due = _log(due)
                    num_cells += 1
                    column_cells[i] += 1
                    column_logs[i] = _log(2 * column_cells[i] + 1)
                    if not reading and at + 64 + 8 * size > len(words):
                        return NO_ROOM, point, width, at
                    num_set, point, width, at = _mask(
                        reading,
                        indices,
                        j,
                        cell,
                        size,
                        kernel_width,
                        kernel,
                        point,
                        width,
                        at,
                        words,
                        model,
                    )
                    if j + num_set > count:
                        return TOO_MANY, point, width, at

                    first, kernel_mean, kernel_signs = j, tensor_mean, 0
                    for k in range(size):
                        if kernel[k] == 0:
                            continue
                        level = np.int64(levels[j])
                        if size > 1:
                            predicted = _predict(kernel, k, kernel_width)
                            near = _nearness(predicted, least)
                            after = _neighbours_after(kernel, k, size, kernel_width)
                            side = min(near, 4) if predicted > 0 else -min(near, 4)
                            signs = 5 * _clamp(kernel_signs, -2, 2) + _clamp(row_signs, -2, 2)
                            sign_context = SIGN + 25 * (side + 4) + signs + 12
                            a = NEIGHBOURS + 16 * (3 * near + after)
                            means = min(_log(kernel_mean) + _log(row_mean) >> 2, 15)
                            b = MEANS + 16 * (4 * means + min(num_set // 3, 3))
                        else:
                            row_size = _size_of_sum(row_sum, least)
                            column_size = _size_of_sum(column_sums[i], least)
                            sign_context = FLAT_SIGN + 9 * (row_size + 4) + column_size + 4
                            a = NEIGHBOURS + 16 * (36 + ratio // 4)
                            b = MEANS + 16 * (4 * min(_log(row_mean) >> 1, 15) + 3)
                        negative, point, width, at = _decide(
                            reading, level < 0, sign_context, FAST, point, width, at, words, model
                        )
                        excess, point, width, at = _number(
                            reading,
                            abs(level) - least,
                            MAGNITUDE_SLOTS,
                            a,
                            b,
                            point,
                            width,
                            at,
                            words,
                            model,
                        )
                        if excess < 0 or excess > MAX_LEVEL - least:
                            return TOO_LARGE, point, width, at
                        level = -(excess + least) if negative else excess + least
                        if reading:
                            indices[j] = cell + k
                            levels[j] = level
                        kernel[k] = level
                        kernel_signs += 1 - 2 * negative
                        row_signs += 1 - 2 * negative
                        row_sum += level
                        column_sums[i] += level
                        value = 16 * excess + 1
                        kernel_mean = _follow(kernel_mean, value, j - first, 1)
                        row_mean = _follow(row_mean, value, row_count, 4)
                        tensor_mean = _follow(tensor_mean, value, tensor_count, 5)
                        row_count += 1
                        tensor_count += 1
                        j += 1
                    if due == 0:
                        break
            bounds[t + 1] = j
        return DONE if j == count else TOO_FEW, point, width, at

    return _compiled(walk)


_write, _read = _build_walk(reading=False), _build_walk(reading=True)


# --- the ends of the body -------------------------------------------------------------------------


def _ending(low: int, width: int) -> tuple[int, int]:
    """The largest number of the fewest bytes within [low, low + width): (number, num_bytes).

    The number has 64 bits, of which the bytes are the highest, and perhaps a carry above them.
    """
    for num_bytes in range(9):
        shift = 64 - 8 * num_bytes
        number = low + width - 1 >> shift << shift
        if number >= low:
            return number, num_bytes
    raise AssertionError("the range is empty")


def _with_ending(words: np.ndarray, low: int, width: int) -> bytes:
    number, num_bytes = _ending(low, width)
    code = (int.from_bytes(words.astype(">u4").tobytes(), "big") << 64) + number
    return code.to_bytes(4 * len(words) + 8, "big")[: 4 * len(words) + num_bytes]


def _check_end(body: bytes, point: int, width: int, at: int) -> None:
    """Raise PayloadError unless the body ends as an encoder would have ended it."""
    start = 4 * (at - 2)
    low = int.from_bytes(body[start : start + 8].ljust(8, b"\0"), "big") - point & 2**64 - 1
    number, num_bytes = _ending(low, width)
    if len(body) < start + num_bytes:
        raise PayloadError("levels: the body ends early")
    if len(body) > start + num_bytes or number - low != point:
        raise PayloadError("levels: bytes are left over, or others than an encoder ends with")


def _varint(number: int) -> bytes:
    """7 bits a byte, the lowest first; the high bit says that more follow."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _read_varint(body: bytes, start: int) -> tuple[int, int]:
    """Return (number, where it ends). Raises PayloadError."""
    number = 0
    for i, byte in enumerate(body[start : start + 5]):
        number |= (byte & 127) << 7 * i
        if byte < 128:
            return number, start + i + 1
    if len(body) < start + 5:
        raise PayloadError("levels: the body ends within a number")
    raise PayloadError("levels: a number of more than 5 bytes")
