"""An adaptive coder of symbols, nine to choose from, with asymmetric numeral systems (rANS).

One number holds all symbols, and gives first the one that was pushed last (Duda 2013, arXiv
1311.2540): so an encoder notes its steps and pushes them backwards. A symbol takes one step without
a branch, where rangecoder.py takes a decision for each bit, which waits for the one before. All is
computed in integers, so bytes are equal on every machine.

A context has eight bounds, which part 32768 among the symbols: symbol s has what lies between
bounds s and s + 1, bound 0 being 0 and bound 9 being 32768. Its four words of 64 bits are 16 lanes:

    lane     0..2   3   4 .. 11       12      13   14, 15
    holds    -      0   bounds 1..8   32768   -    how many symbols it has seen, at most 48

Bounds have 15 bits. So words are added and compared as a whole, all four lanes at once.

Shorthand of the kernels below: `head` is the pair (x, at): x the number, at the next item of the
`tape`: words, uint32, that x takes in when it has become small (reading), or the steps taken so
far, uint64 (writing). `table` is a pair too: the words of all contexts, and the same as lanes.
The lanes of a word are told apart as little-endian machines do.
"""

import numpy as np

from compiled import compiled, index, inlined

LEAST_HEAD, WORD = np.uint64(1 << 31), np.uint64(32)  # below LEAST_HEAD, a word is taken in
LOW_LANE, LOW_WORD = np.uint64(0xFFFF), np.uint64(0xFFFFFFFF)
STEADY = 48  # from so many symbols on, a context learns at its slowest rate

# Symbols for a number: 0, 1, 2, 3, then ranges with bits of their own, and all from ESCAPE on.
FIRST_OF = np.array([0, 1, 2, 3, 4, 6, 10, 18, 34], np.int64)
BITS_OF = np.array([0, 0, 0, 0, 1, 2, 3, 4, 0], np.int64)
ESCAPE = 34
SYMBOL_OF = np.digitize(np.arange(ESCAPE + 1), FIRST_OF[1:]).astype(np.int64)


def _word(lanes) -> int:
    """Four numbers of 16 bits, the first one lowest."""
    return sum(int(number) << 16 * i for i, number in enumerate(lanes))


def _goals(rate: int, symbol: int) -> list[int]:
    """What the eight bounds get, having lost 1 / 2^rate: each one more than the bound below it.

    So every symbol keeps at least 1 of the 32768.
    """
    return [i if i <= symbol else (32768 >> rate) - 9 + i for i in range(1, 9)]


ONES, GUARDS = np.uint64(_word([1] * 4)), np.uint64(_word([32768] * 4))
RATES = range(3, 7)  # a bound moves by 1 / 2^rate
KEPT = np.array([_word([32767 >> rate] * 4) for rate in RATES], np.uint64)
GOALS = np.array(
    [
        [_word(goals[:4]), _word(goals[4:])]
        for rate in RATES
        for goals in (_goals(rate, symbol) for symbol in range(9))
    ],
    np.uint64,
).ravel()


def first_words(weights: np.ndarray) -> np.ndarray:
    """The words, uint64 [4 * num_contexts], of contexts that have seen nothing.

    weights: int [num_contexts, 9], none of them 0: how likely each symbol is then.
    """
    sums = np.cumsum(weights, axis=1)
    bounds = (32768 * sums[:, :8] // sums[:, 8:]).astype(np.uint64)
    words = np.zeros((len(weights), 4), np.uint64)
    for lane in range(4):
        words[:, 1] |= bounds[:, lane] << np.uint64(16 * lane)
        words[:, 2] |= bounds[:, 4 + lane] << np.uint64(16 * lane)
    words[:, 3] = 32768
    return words.ravel()


def new_table(first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A table that begins with those words."""
    words = first.copy()
    return words, words.view(np.uint16)


# --- symbols --------------------------------------------------------------------------------------


@inlined
def _part(reading, symbol, x, context, table):
    """The symbol on top of x (reading) and its part, which the context then enlarges.

    Returns (symbol, low, size): the part begins at low.
    """
    words, lanes = table
    first, second = words[index(4 * context + 1)], words[index(4 * context + 2)]
    if reading:  # how many bounds are at most the place; a guard stays where one is
        places = (x & np.uint64(32767)) * ONES | GUARDS
        reached = (places - first >> np.uint64(15) & ONES) + (
            places - second >> np.uint64(15) & ONES
        )
        symbol = np.int64(reached * ONES >> np.uint64(48))
    low = np.uint64(lanes[index(16 * context + 3 + symbol)])
    size = np.uint64(lanes[index(16 * context + 4 + symbol)]) - low

    seen = np.int64(words[index(4 * context + 3)] >> WORD)
    words[index(4 * context + 3)] = np.uint64(min(seen + 1, STEADY)) << WORD | np.uint64(32768)
    pace = seen >> 4
    rate, goal = np.uint64(3 + pace), 18 * pace + 2 * symbol
    lost, lost_too = first >> rate & KEPT[index(pace)], second >> rate & KEPT[index(pace)]
    words[index(4 * context + 1)] = first - lost + GOALS[index(goal)]
    words[index(4 * context + 2)] = second - lost_too + GOALS[index(goal + 1)]
    return symbol, low, size


@inlined
def _pop(low, size, num_bits, head, tape):
    """Take a symbol with that part off x, and then as many bits. Returns (bits, head)."""
    x, at = head
    x = size * (x >> np.uint64(15)) + (x & np.uint64(32767)) - low
    bits = np.int64(x) & (1 << num_bits) - 1
    x >>= np.uint64(num_bits)
    if x < LEAST_HEAD and at < len(tape):
        x = x << WORD | np.uint64(tape[index(at)])
        at += 1
    return bits, (x, at)


@inlined
def _note(low, size, num_bits, bits, head, tape):
    """Write down a step, to be pushed later. Returns head."""
    x, at = head
    bits = np.uint64(bits) << np.uint64(8) | np.uint64(num_bits)
    if at < len(tape):  # past the end, steps are only counted
        tape[index(at)] = bits << WORD | low << np.uint64(16) | size
    return x, at + 1


@inlined
def code_symbol(reading, symbol, context, head, tape, table):
    """One of nine symbols. Returns (symbol, head)."""
    symbol, low, size = _part(reading, symbol, head[0], context, table)
    if reading:
        _, head = _pop(low, size, 0, head, tape)
    else:
        head = _note(low, size, 0, 0, head, tape)
    return symbol, head


@inlined
def code_small_number(reading, number, context, head, tape, table):
    """A number below ESCAPE; ESCAPE stands for all others. Returns (number, head)."""
    symbol = 0 if reading else SYMBOL_OF[index(min(number, ESCAPE))]
    symbol, low, size = _part(reading, symbol, head[0], context, table)
    first, num_bits = FIRST_OF[index(symbol)], BITS_OF[index(symbol)]
    if reading:
        bits, head = _pop(low, size, num_bits, head, tape)
        number = first + bits
    else:
        bits = number - first if number < ESCAPE else 0
        head = _note(low, size, num_bits, bits, head, tape)
    return number, head


# --- the ends of a tape ---------------------------------------------------------------------------


@compiled
def _push_all(steps, words):
    """Push the steps, the last one first; words, uint32, fill from their end. Returns (x, at)."""
    x, at = np.uint64(1), len(words)
    for k in range(len(steps) - 1, -1, -1):
        step = steps[index(k)]
        size, low = step & LOW_LANE, step >> np.uint64(16) & LOW_LANE
        num_bits, bits = step >> WORD & np.uint64(255), step >> np.uint64(40)
        if x >= size << np.uint64(48) - num_bits:  # it would outgrow 63 bits
            at -= 1
            words[index(at)] = np.uint32(x & LOW_WORD)
            x >>= WORD
        x = x << num_bits | bits
        x = (x // size << np.uint64(15)) + low + x % size
    return x, at


def push_all(steps: np.ndarray) -> tuple[int, bytes]:
    """(x, words): what a reader begins with, from the steps of a writer, uint64 [num_steps]."""
    words = np.empty(len(steps), np.uint32)
    x, at = _push_all(steps, words)
    return int(x), words[at:].astype(">u4").tobytes()


def is_spent(head: tuple, tape: np.ndarray) -> bool:
    """Whether a reader has taken all that was pushed, and nothing else was there."""
    return int(head[0]) == 1 and int(head[1]) == len(tape)
