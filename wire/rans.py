"""An adaptive coder of symbols, of which there are nine, with asymmetric numeral systems (rANS).

One number holds all symbols, like a stack: it gives first the symbol that was pushed last (Duda
2013, arXiv 1311.2540). So an encoder notes its steps and pushes them backwards. A symbol takes one
step without a branch, where range_coder.py takes a decision for each bit, which has to wait for the
decision before. It computes in integers only, so bytes are equal on every machine.

A context has eight bounds, which divide 32768 among the symbols: symbol s has what lies between the
bounds s and s + 1, where bound 0 is 0 and bound 9 is 32768. A context is kept in four words of 64
bits, which are 16 lanes of 16 bits:

    lane     0..2   3   4 .. 11       12      13   14, 15
    holds    -      0   bounds 1..8   32768   -    how many symbols it has seen, at most 48

Bounds have 15 bits, so whole words are added and compared: four lanes at once. Lane 0 of a word is
its lowest, as little-endian machines have it.

Shorthand of the kernels below:

    head      the pair (x, at): x is the number, and `at` the index of the next item of the tape.
              When writing it may lie past the end: steps for which there is no room are counted.
    tape      reading: the words, uint32, that x takes in when it has become small;
              writing: the steps so far, uint64
    table     the pair (words of all contexts, the same memory as lanes)
"""

import numpy as np

from compiled import compiled, index, inlined, num_ones

LEAST_HEAD, WORD = np.uint64(1 << 31), np.uint64(32)  # below LEAST_HEAD, x takes in a word
LOW_LANE, LOW_WORD = np.uint64(0xFFFF), np.uint64(0xFFFFFFFF)
STEADY = 48  # after so many symbols, a context learns at its slowest rate

# A symbol stands for the number 0, 1, 2 or 3, for a range of numbers, of which a few plain bits say
# which one it is, or for all numbers from ESCAPE on.
FIRST_OF = np.array([0, 1, 2, 3, 4, 6, 10, 18, 34], np.int64)
BITS_OF = np.array([0, 0, 0, 0, 1, 2, 3, 4, 0], np.int64)
ESCAPE = 34
SYMBOL_OF = np.digitize(np.arange(ESCAPE + 1), FIRST_OF[1:]).astype(np.int64)


def _word(lanes) -> int:
    """Put four numbers of 16 bits into a word, the first one lowest."""
    return sum(int(number) << 16 * i for i, number in enumerate(lanes))


def _goals(rate: int, symbol: int) -> list[int]:
    """What is added to the eight bounds when a symbol was seen, after they have lost 1 / 2^rate.

    Each bound gets at least one more than the bound below it, so that every symbol keeps at least
    one of the 32768.
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

    weights: int [num_contexts, 9], none of them 0: how likely each symbol is at first.
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
    """A table that begins with these words."""
    words = first.copy()
    return words, words.view(np.uint16)


# --- symbols --------------------------------------------------------------------------------------


@inlined
def _part(reading, symbol, x, context, table):
    """Find the part of 32768 that a symbol has, and let the context learn the symbol.

    A reader finds the symbol as well, on top of x. Returns (symbol, low, size): the part begins at
    low.
    """
    words, lanes = table
    first, second = words[index(4 * context + 1)], words[index(4 * context + 2)]
    if reading:  # count the bounds that are at most the place: in their lanes the guard bit stays
        places = (x & np.uint64(32767)) * ONES | GUARDS
        symbol = num_ones(places - first & GUARDS) + num_ones(places - second & GUARDS)
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
    """Take a symbol with this part off x, and then `num_bits` bits. Returns (bits, head)."""
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
    """Note a step, which push_all() takes later. Returns head."""
    x, at = head
    bits = np.uint64(bits) << np.uint64(8) | np.uint64(num_bits)
    if at < len(tape):
        tape[index(at)] = bits << WORD | low << np.uint64(16) | size
    return x, at + 1


@inlined
def code_symbol(reading, symbol, context, head, tape, table):
    """Code one of nine symbols. Returns (symbol, head)."""
    symbol, low, size = _part(reading, symbol, head[0], context, table)
    if reading:
        _, head = _pop(low, size, 0, head, tape)
    else:
        head = _note(low, size, 0, 0, head, tape)
    return symbol, head


@inlined
def code_small_number(reading, number, context, head, tape, table):
    """Code a number below ESCAPE; ESCAPE stands for all others. Returns (number, head)."""
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
    """Push the steps, the last one first. Returns (x, at): words[at:], uint32, are written."""
    x, at = np.uint64(1), len(words)
    for k in range(len(steps) - 1, -1, -1):
        step = steps[index(k)]
        size, low = step & LOW_LANE, step >> np.uint64(16) & LOW_LANE
        num_bits, bits = step >> WORD & np.uint64(255), step >> np.uint64(40)
        if x >= size << np.uint64(48) - num_bits:  # else x would outgrow 63 bits
            at -= 1
            words[index(at)] = np.uint32(x & LOW_WORD)
            x >>= WORD
        x = x << num_bits | bits
        x = (x // size << np.uint64(15)) + low + x % size
    return x, at


def push_all(steps: np.ndarray) -> tuple[int, bytes]:
    """Return (x, words), with which a reader begins. steps: a writer's, uint64 [num_steps]."""
    words = np.empty(len(steps), np.uint32)
    x, at = _push_all(steps, words)
    return int(x), words[at:].astype(">u4").tobytes()


def is_spent(head: tuple, tape: np.ndarray) -> bool:
    """Whether a reader has taken all that was pushed, and there was nothing else."""
    return int(head[0]) == 1 and int(head[1]) == len(tape)
