"""An adaptive binary range coder: yes/no decisions, each with a context that learns.

The range coder is that of Martin 1979, with carries; the binary contexts are as in CABAC (Marpe et
al. 2003). It computes in integers only, so bytes are equal on every machine. It knows nothing of
what the decisions mean; walk.py does.

A routine that codes is compiled once to write and once to read, and `reading` is a constant in it.
Shorthand of the kernels below:

    state     the triple (point, width, at). `width` is the size of the range. `point` is the low
              end of the range when writing, and the code minus this low end when reading. `at` is
              the index of the next word. It may lie past the end of the words: a reader then reads
              zeros, and a writer only counts the words for which there is no room.
    words     uint32 [num_words]: the code
    model     int64 [num_contexts]: for each context 256 * probability + count. The probability is
              that of a one, in 1/65536; the count is that of the decisions so far, up to a limit.
"""

import numpy as np

from compiled import index, inlined
from wire.container import PayloadError

EVEN = np.uint64(32768)  # one half, in 1/65536
LEAST_PROBABILITY, LARGEST_PROBABILITY = 32, 65504
FAST, SLOW = 62, 126  # where counts stop: a decision then moves a probability by 1/64 or 1/128
SLOTS = 12  # a bank has 32 contexts; lengths of a number from this one on share theirs
RATES = np.array([65536 // (count + 2) for count in range(SLOW + 1)], np.int64)

# 4 * log2(n) of the first 4096 numbers, as far as the four bits after the leading one tell it. A
# byte each, because eight would fill a CPU's first cache alone.
QUARTERS = (0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3)
LOGARITHMS = np.array(
    [0]
    + [
        4 * (n.bit_length() - 1) + QUARTERS[n << 4 >> n.bit_length() - 1 & 15]
        for n in range(1, 4096)
    ],
    np.uint8,
)


def new_model(probability: np.ndarray, count: np.ndarray) -> np.ndarray:
    """A model that has seen nothing, int64 [num_contexts].

    probability: of a one, in 1/65536. count: so many decisions these probabilities are worth.
    """
    return 256 * np.clip(probability, LEAST_PROBABILITY, LARGEST_PROBABILITY) + count


# --- decisions ------------------------------------------------------------------------------------


@inlined
def share_of_ones(probability, state):
    """The part of the range that stands for a one. probability: of a one, in 1/65536."""
    return (state[1] >> np.uint64(16)) * np.uint64(probability)


@inlined
def _carry(j, words):
    """Add one to word j. It never carries beyond the first word: a code is a number below 1."""
    while words[index(j)] == 0xFFFFFFFF:
        words[index(j)] = 0
        j -= 1
    words[index(j)] += np.uint32(1)


@inlined
def take(reading, bit, ones, state, words):
    """Narrow the range to the part that stands for a one, or to the rest. Returns state."""
    point, width, at = state
    if bit:
        width = ones
    else:
        width -= ones
        if reading:
            point -= ones
        else:
            point += ones
            if point < ones and at <= len(words):
                _carry(at - 1, words)
    if width < np.uint64(1 << 32):
        width <<= np.uint64(32)
        inside = at < len(words)
        if reading:
            word = np.uint64(words[index(at)]) if inside else np.uint64(0)
            point = point << np.uint64(32) | word
        else:
            if inside:
                words[index(at)] = np.uint32(point >> np.uint64(32))
            point <<= np.uint64(32)
        at += 1
    return point, width, at


@inlined
def narrow(reading, bit, probability, state, words):
    """Code one decision. probability: of a one, in 1/65536. Returns (bit, state)."""
    ones = share_of_ones(probability, state)
    if reading:
        bit = 1 if state[0] < ones else 0
    return bit, take(reading, bit, ones, state, words)


@inlined
def learn(bit, context, last, model):
    """Move the probability of a context towards the bit by 1 / (count + 2)."""
    entry = model[index(context)]
    count, probability = entry & 255, entry >> 8
    goal = LARGEST_PROBABILITY if bit else LEAST_PROBABILITY
    if count == last:  # nearly always: then the product below is a shift, and the count stays as is
        entry += 256 * goal + 255 - entry >> (6 if last == FAST else 7) & -256
    else:
        probability += (goal - probability) * RATES[index(count)] >> 16
        entry = probability << 8 | count + 1
    model[index(context)] = entry


@inlined
def decide(reading, bit, context, last, state, words, model):
    """Code a decision with one context. Returns (bit, state)."""
    probability = np.uint64(model[index(context)] >> 8)
    bit, state = narrow(reading, bit, probability, state, words)
    learn(bit, context, last, model)
    return bit, state


@inlined
def decide_by_two(reading, bit, a, b, state, words, model):
    """Code a decision with the mean probability of two contexts. Returns (bit, state)."""
    probability = np.uint64((model[index(a)] >> 8) + (model[index(b)] >> 8) >> 1)
    bit, state = narrow(reading, bit, probability, state, words)
    learn(bit, a, FAST, model)
    learn(bit, b, FAST, model)
    return bit, state


@inlined
def code_number(reading, number, a, b, state, words, model):
    """Code a number >= 0 as Elias' gamma code of number + 1, with contexts of the banks at a and b.

    The length is written in unary. Of the bits below the leading one only the first has contexts.
    Returns (number, state); the number is -1 if it has more than 31 bits, which no encoder writes.
    """
    length = 0
    if not reading:
        while number + 1 >> length + 1:
            length += 1
    m = 0
    while True:
        go_on, slot = 1 if m < length else 0, min(m, SLOTS)
        go_on, state = decide_by_two(reading, go_on, a + slot, b + slot, state, words, model)
        if go_on == 0:
            break
        m += 1
        if m > 30:
            return -1, state
    value = 1
    for j in range(m - 1, -1, -1):
        bit = number + 1 >> j & 1
        if j == m - 1:
            slot = SLOTS + min(m, SLOTS)
            bit, state = decide_by_two(reading, bit, a + slot, b + slot, state, words, model)
        else:
            bit, state = narrow(reading, bit, EVEN, state, words)
        value = value * 2 + bit
    return value - 1, state


# --- numbers that choose contexts -----------------------------------------------------------------


@inlined
def log(n):
    """4 * log2(n) as in LOGARITHMS, for 0 <= n < 2^36; 0 for 0."""
    if n < 1 << 12:
        return np.int64(LOGARITHMS[index(n)])
    if n < 1 << 20:
        return np.int64(LOGARITHMS[index(n >> 8)]) + 32
    if n < 1 << 28:
        return np.int64(LOGARITHMS[index(n >> 16)]) + 64
    return np.int64(LOGARITHMS[index(n >> 24)]) + 96


@inlined
def clamp(v, low, high):
    return low if v < low else high if v > high else v


# --- the ends of a code ---------------------------------------------------------------------------


def writing_state() -> tuple[np.uint64, np.uint64, int]:
    """The state of a writer before the first decision."""
    return np.uint64(0), np.uint64(2**64 - 1), 0


def reading_state(code: bytes) -> tuple[tuple[np.uint64, np.uint64, int], np.ndarray]:
    """Return (state, words) to read a code with."""
    words = np.frombuffer(code + bytes(-len(code) % 4), ">u4").astype(np.uint32)
    point = int.from_bytes(code[:8].ljust(8, b"\0"), "big")
    return (np.uint64(point), np.uint64(2**64 - 1), 2), words


def with_ending(words: np.ndarray, state: tuple) -> bytes:
    """Return the code that was written: its words, and then the fewest bytes that end it."""
    point, width, at = map(int, state)
    number, num_bytes = _ending(point, width)
    code = (int.from_bytes(words[:at].astype(">u4").tobytes(), "big") << 64) + number
    return code.to_bytes(4 * at + 8, "big")[: 4 * at + num_bytes]


def check_end(code: bytes, state: tuple) -> None:
    """Raise PayloadError unless a reader has come to the end of the code, as a writer ends it."""
    point, width, at = map(int, state)
    start = 4 * (at - 2)
    low = int.from_bytes(code[start : start + 8].ljust(8, b"\0"), "big") - point & 2**64 - 1
    number, num_bytes = _ending(low, width)
    if len(code) < start + num_bytes:
        raise PayloadError("levels: the body ends early")
    if len(code) > start + num_bytes or number - low != point:
        raise PayloadError("levels: bytes are left over, or others than an encoder ends with")


def _ending(low: int, width: int) -> tuple[int, int]:
    """Of the numbers within [low, low + width), one that takes the fewest bytes, and the largest.

    Returns (number, num_bytes). The number has 64 bits, of which the bytes are the highest; above
    them there may be a carry.
    """
    for num_bytes in range(9):
        shift = 64 - 8 * num_bytes
        number = low + width - 1 >> shift << shift
        if number >= low:
            return number, num_bytes
    raise AssertionError("the range is empty")


def varint(number: int) -> bytes:
    """Write 7 bits a byte, the lowest first. The high bit of a byte says that another follows."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def read_varint(body: bytes, start: int) -> tuple[int, int]:
    """Return (number, where it ends); it has at most 63 bits. Raises PayloadError."""
    number = 0
    for i, byte in enumerate(body[start : start + 9]):
        number |= (byte & 127) << 7 * i
        if byte == 0 and i > 0:
            raise PayloadError("levels: a number of more bytes than it needs")
        if byte < 128:
            return number, start + i + 1
    if len(body) < start + 9:
        raise PayloadError("levels: the body ends within a number")
    raise PayloadError("levels: a number of more than 9 bytes")
