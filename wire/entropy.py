"""Sparse integers in few bytes: which entries of a vector are not zero, and what they are.

walk.py goes through the tensors and codes what it meets with two coders: yes/no decisions with
range_coder.py, symbols with rans.py. This file puts a head in front of what they write, and checks
that a stranger's bytes are all there and end as an encoder ends them. docs/wire-format.md specifies
every bit.
"""

import threading

import numpy as np

from layout import Layout
from wire.container import PayloadError
from wire.contexts import FIRST_DECISIONS, FIRST_SYMBOLS
from wire.range_coder import (
    check_end,
    read_varint,
    reading_state,
    varint,
    with_ending,
    writing_state,
)
from wire.rans import LEAST_HEAD, is_spent, new_table, push_all
from wire.scan import as_grids, new_scratch, out_of_order, scan_order
from wire.walk import DONE, FAULTS, MAX_LEVEL, Walk, read_walk, write_walk

# What each thread writes on, up to this many steps of rans.py: new pages would take a tenth of the
# time that writing takes (docs/LOG.md).
MOST_KEPT = 1 << 20
kept = threading.local()


def encode_integers(indices: np.ndarray, levels: np.ndarray, layout: Layout) -> bytes:
    """Code the entries of an integer vector [layout.size] that are not zero.

    indices: int64 [n], ascending, distinct and within the layout. levels: integers [n], not zero
    and at most MAX_LEVEL in magnitude. Raises ValueError for other levels or indices.
    """
    if len(indices) == 0:
        return varint(0)
    magnitudes = np.abs(np.asarray(levels, np.int64))
    least, spread = int(magnitudes.min()), int(np.ptp(magnitudes))
    if least == 0 or least + spread > MAX_LEVEL:
        raise ValueError(f"levels must lie within 1..{MAX_LEVEL} in magnitude")
    tensors = as_grids(layout)
    *entries, copies = scan_order(tensors, indices.astype(np.int64), levels.astype(np.int16))
    scratch = new_scratch(tensors)
    num_words, num_steps = 256 + 2 * len(indices), 256 + 4 * len(indices)  # mostly enough
    while True:
        words, tape = _room("words", num_words, np.uint32), _room("tape", num_steps, np.uint64)
        walk = _new_walk(tensors, copies, *entries, least, spread, words, tape, scratch)
        ending, state, head = write_walk(walk, writing_state(), (np.uint64(0), 0))
        if ending != DONE:
            raise ValueError(f"indices must be ascending and within the layout: {FAULTS[ending]}")
        if state[2] <= num_words and head[1] <= num_steps:
            break
        num_words, num_steps = state[2], head[1]  # the coders count what does not fit
    code = with_ending(words, state)
    x, rest = push_all(tape[: head[1]])
    numbers = len(indices), least, spread, len(code), x
    return b"".join(map(varint, numbers)) + code + rest


def decode_integers(body: bytes | memoryview, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return (indices: int64 [n], ascending and distinct; levels: int16 [n], not zero).

    This takes 10 bytes for each level that the body announces, and a body that announces more
    levels than the layout has entries is refused. Raises PayloadError.
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
    if rest and x < LEAST_HEAD:
        raise PayloadError(f"levels: a stack that begins with {x}, before its words")
    tensors = as_grids(layout)
    indices, levels = np.empty(count, np.int64), np.zeros(count, np.int16)
    copies = np.zeros(len(tensors), np.int64)
    state, words = reading_state(code)
    tape = np.frombuffer(rest, ">u4").astype(np.uint32)
    scratch = new_scratch(tensors)
    walk = _new_walk(tensors, copies, indices, levels, least, spread, words, tape, scratch)
    ending, state, head = read_walk(walk, state, (np.uint64(x), 0))
    if ending != DONE:
        raise PayloadError(f"levels: {FAULTS[ending]}")
    check_end(code, state)
    if not is_spent(head, tape):
        raise PayloadError("levels: words are left over, or others than an encoder ends with")
    # Each position of each cell has an index of its own. The walk meets them in ascending order,
    # except in the tensors that are sorted here. So all indices ascend, and no two are equal.
    for t in out_of_order(layout):
        part = slice(walk.bounds[t], walk.bounds[t + 1])
        _sort(indices[part], levels[part])
    return indices, levels


def _room(name: str, size: int, dtype: type) -> np.ndarray:
    """An array [size] to write on, which the next call with this name gives away again."""
    array = getattr(kept, name, None)
    if array is None or len(array) < size:
        array = np.empty(size, dtype)
        if size <= MOST_KEPT:
            setattr(kept, name, array)
    return array[:size]


def _sort(indices: np.ndarray, levels: np.ndarray) -> None:
    """Sort both by the indices, in place: each level travels in the low 16 bits of its index."""
    indices <<= 16
    indices |= levels.view(np.uint16)
    indices.sort()
    levels[:] = indices  # an int16 takes the low 16 bits
    indices >>= 16


def _new_walk(tensors, copies, indices, levels, least, spread, words, tape, scratch) -> Walk:
    """A walk in which nothing has been coded yet."""
    model, table = FIRST_DECISIONS.copy(), new_table(FIRST_SYMBOLS)
    numbers = indices, levels, least, spread
    return Walk(tensors, copies, *numbers, words, model, tape, table, *scratch)
