"""A second decoder, written from docs/wire-format.md alone: plain Python, one bit at a time.

It knows none of our modules, so that the page, the coder and this decoder check each other.
"""

import struct
from hashlib import blake2b
from math import isfinite, prod

import numpy as np
import xxhash
import zstandard


class Refused(Exception):
    pass


SIXTH_ROOTS = (1.0, 1.122462, 1.2599211, 1.4142135, 1.587401, 1.7817974)


def demand(condition: bool, what: str) -> None:
    if not condition:
        raise Refused(what)


def decode(payload: bytes, tensors: list[tuple[str, tuple[int, ...]]], agreed: bytes = b""):
    """Return (positions or None for all, values): ints and floats that are float32 numbers."""
    demand(len(payload) >= 32, "too short")
    demand(payload[0:4] == b"FLUP", "magic")
    demand(payload[4] == 3, "version")
    selection, kind, flags = payload[5:8]
    demand(selection in (0, 1, 2, 3), "selection")
    sparse_kinds = (0, 1, 2, 6)
    demand(kind in (range(10), sparse_kinds, (3, 5, 8), sparse_kinds)[selection], "kind")
    compressible = (3, 4, 5, 6, 8) if selection == 0 else () if selection == 2 else (6,)
    demand(flags in (0, 2) or flags in (1, 3) and kind in compressible, "flags")
    demand(payload[8:16] == fingerprint(tensors, agreed), "layout")
    demand(int.from_bytes(payload[16:24], "little") == len(payload) - 32, "length")
    demand(payload[-8:] == xxhash.xxh3_64_digest(payload[:-8])[::-1], "checksum")

    body = Body(payload[24:-8])
    shapes = [shape for _, shape in tensors]
    if flags < 2:
        positions, values = read_body(body, selection, kind, flags == 1, shapes)
    else:
        limit = body.take_u32()
        small = [prod(shape) < limit for shape in shapes]
        first = body.take_floats(sum(prod(shape) for shape in shapes if prod(shape) < limit))
        coded = [shape for shape in shapes if prod(shape) >= limit]
        rest = read_body(body, selection, kind, flags == 3, coded)
        positions, values = merge(shapes, small, first, *rest)
    demand(all(isfinite(value) for value in values), "not finite")
    return positions, values


def read_body(body, selection: int, kind: int, compressed: bool, shapes):
    sizes = [prod(shape) for shape in shapes]
    if selection == 2:
        return read_coded(body, kind, shapes)
    if selection == 1:
        positions, _ = read_positions(body, sizes)
    elif selection == 3:
        ones = read_levels(body.take(body.take_u32()), shapes)
        demand(all(level == 1 for level in ones.values()), "a position that is not 1")
        positions = sorted(ones)
    else:
        positions = None
    count = sum(sizes) if positions is None else len(positions)
    values = read_values(body, kind, compressed, count, shapes)
    demand(body.data == b"", "bytes left over")
    return positions, values


def merge(shapes, small: list[bool], first: list[float], positions, values):
    """Put the values of small tensors and those of the rest in the order of the vector."""
    first, values = iter(first), iter(values)
    arriving, start, coded_start = {}, 0, 0
    for shape, is_small in zip(shapes, small, strict=True):
        size = prod(shape)
        if is_small:
            arriving |= {start + i: next(first) for i in range(size)}
        elif positions is None:
            arriving |= {start + i: next(values) for i in range(size)}
        else:
            inside = [p for p in positions if coded_start <= p < coded_start + size]
            arriving |= {start + p - coded_start: next(values) for p in inside}
        start += size
        coded_start += 0 if is_small else size
    return None if positions is None else list(arriving), list(arriving.values())


def fingerprint(tensors, agreed: bytes = b"") -> bytes:
    parts = []
    for name, shape in tensors:
        escaped = "".join("\\" + letter if letter in "\\:;" else letter for letter in name)
        parts.append(escaped + ":" + ",".join(str(n) for n in shape))
    return blake2b(agreed + ";".join(parts).encode("utf-8"), digest_size=8).digest()


def agreed_on_a_mask(whole_fingerprint: bytes, positions: list[int]) -> bytes:
    data = whole_fingerprint + b"".join(struct.pack("<Q", position) for position in positions)
    return blake2b(data, digest_size=8).digest()


class Body:
    def __init__(self, data: bytes):
        self.data = data

    def take(self, count: int) -> bytes:
        demand(count <= len(self.data), "the body is too short")
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def take_u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def take_floats(self, count: int) -> list[float]:
        return list(struct.unpack(f"<{count}f", self.take(4 * count)))

    def take_fields(self, count: int, bits: int) -> list[int]:
        stream = self.take_bits((count * bits + 7) // 8)
        demand("1" not in stream[count * bits :], "padding")
        return [int(stream[i * bits : (i + 1) * bits], 2) for i in range(count)]

    def take_bits(self, num_bytes: int) -> str:
        return "".join(f"{byte:08b}" for byte in self.take(num_bytes))


def read_positions(body: Body, sizes: list[int]) -> tuple[list[int], list[int]]:
    counts = [body.take_u32() for _ in sizes]
    for count, size in zip(counts, sizes, strict=True):
        demand(count <= size, "more positions than entries")
    widths = [remainder_bits(size, count) for size, count in zip(sizes, counts, strict=True)]

    unary = body.take_bits(body.take_u32())
    num_bits = sum(width * count for width, count in zip(widths, counts, strict=True))
    remainders = body.take_bits((num_bits + 7) // 8)

    positions, start = [], 0
    for size, count, width in zip(sizes, counts, widths, strict=True):
        next_free = 0  # the first entry of this tensor that is not decided yet
        for _ in range(count):
            quotient = unary.find("1")
            demand(quotient >= 0, "the unary stream ends early")
            unary = unary[quotient + 1 :]
            low, remainders = remainders[:width], remainders[width:]
            position = next_free + (quotient << width) + int("0" + low, 2)
            demand(position < size, "beyond the tensor")
            positions.append(start + position)
            next_free = position + 1
        start += size
    for padding in (unary, remainders):
        demand(len(padding) < 8 and "1" not in padding, "padding")
    return positions, counts


def remainder_bits(size: int, count: int) -> int:
    gap, width = 177 * size // (256 * max(count, 1)), 0
    while gap >= 2 ** (width + 1):
        width += 1
    return width


def read_values(body: Body, kind: int, compressed: bool, count: int, shapes) -> list[float]:
    if kind == 0:
        return body.take_floats(count)
    if kind == 1:
        return list(struct.unpack(f"<{count}e", body.take(2 * count)))
    if kind == 2:
        halves = struct.unpack(f"<{count}H", body.take(2 * count))
        return [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]
    if kind == 7:
        return read_factors(body, shapes)
    if kind == 9:
        return read_rotated(body, shapes, count)
    bits = body.take(1)[0]
    demand(1 <= bits <= (4 if kind in (6, 8) else 16), "bits")
    groups = {  # how many values have the same scale
        3: [count],
        4: [prod(shape) for shape in shapes if prod(shape) > 0],
        5: [min(512, count - start) for start in range(0, count, 512)],
        6: blocks_of(count),
        8: [prod(shape) for shape in shapes if prod(shape) > 0],
    }[kind]
    fields = sum(groups)
    size = 4 * len(groups) + (fields * bits + 7) // 8
    if kind == 6:
        size += 8 + 4 * (count - fields)
    if kind == 8:
        size += 4 * len(groups) * (2 ** (bits - 1) - 1)
    if compressed:
        body.data = read_frame(body.data, size)
    if kind == 6:
        return read_eden(body, bits, groups, count)
    if kind == 8:
        tables = [body.take_floats(2 ** (bits - 1)) for _ in groups]
        fields, half = body.take_fields(count, bits), 2 ** (bits - 1)
        return look_up([f + 1 if f < half else f - 2 * half for f in fields], tables, groups)
    scales = body.take_floats(len(groups))
    fields = iter(body.take_fields(count, bits))
    return [
        product(level_of(next(fields), bits), scale)
        for scale, group in zip(scales, groups, strict=True)
        for _ in range(group)
    ]


def read_frame(frame: bytes, size: int) -> bytes:
    demand(frame[:4] == b"\x28\xb5\x2f\xfd" and size > 0, "no frame")
    try:
        header = zstandard.get_frame_parameters(frame)
        demand(header.content_size == size and header.dict_id == 0, "frame header")
        demand(header.window_size <= max(size, 131072), "window")
        reader = zstandard.ZstdDecompressor().decompressobj()
        content = reader.decompress(frame)
    except zstandard.ZstdError as error:
        raise Refused(str(error)) from None
    demand(reader.eof and reader.unused_data == b"" and len(content) == size, "frame")
    return content


def level_of(field: int, bits: int) -> int:
    if bits == 1:
        return 1 - 2 * field
    return field - 2**bits if field >= 2 ** (bits - 1) else field


def look_up(levels: list[int], tables: list[list[float]], groups: list[int]) -> list[float]:
    own = [table for table, group in zip(tables, groups, strict=True) for _ in range(group)]
    pairs = zip(levels, own, strict=True)
    return [table[level - 1] if level > 0 else -table[-level - 1] for level, table in pairs]


def product(level: int, scale: float) -> float:
    return round_to_float32(level * scale)


def round_to_float32(number: float) -> float:
    try:  # a level and a scale are exact in a double, so this is the only rounding
        return struct.unpack("<f", struct.pack("<f", number))[0]
    except OverflowError:
        return float("inf")


# --- EDEN and PowerSGD ----------------------------------------------------------------------------

POSITIVE_CENTROIDS = {
    1: "0.79788456",
    2: "0.45278005 1.5104176",
    3: "0.24509418 0.75600522 1.3439093 2.1519457",
    4: "0.12839504 0.3880483 0.65675914 0.94234043 1.2562312 1.6180464 2.0690172 2.7325895",
}
LARGEST = 2.0**128 - 2.0**104


def blocks_of(count: int) -> list[int]:
    sizes = [8192] * (count // 8192)
    return sizes + [2**b for b in range(12, 3, -1) if count % 8192 & 2**b]


def random_number(seed: int, k: int) -> int:
    z = (seed + (k + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def read_eden(body: Body, bits: int, sizes: list[int], count: int) -> list[float]:
    seed = int.from_bytes(body.take(8), "little")
    scales = body.take_floats(len(sizes))
    demand(all(isfinite(scale) for scale in scales), "a scale that is not finite")
    positive = [np.float32(number) for number in POSITIVE_CENTROIDS[bits].split()]
    table = [-number for number in positive[::-1]] + positive
    fields = body.take_fields(sum(sizes), bits)
    values = []
    for size, scale in zip(sizes, scales, strict=True):
        start = len(values)
        x = [table[index] for index in fields[start : start + size]]
        for stage in (1, 0):
            x = flipped(turned(x), start, stage, seed)
        with np.errstate(over="ignore"):
            x = [float(number * np.float32(scale)) for number in x]
        values += [max(-LARGEST, min(LARGEST, number)) for number in x]
    return values + body.take_floats(count - sum(sizes))


def read_rotated(body: Body, shapes, count: int) -> list[float]:
    sizes = padded_blocks_of(count)
    total = sum(sizes)
    seed = int.from_bytes(body.take(8), "little")
    scales = []
    for _ in sizes:
        scales += struct.unpack("<f", b"\0\0" + body.take(2))
    demand(all(isfinite(scale) and scale >= 0 for scale in scales), "a scale")
    code = body.take(1)[0]
    demand(code in (0, 1), "code of positions and signs")
    if code == 0:
        positions, _ = read_positions(body, [total])
        negative = body.take_fields(len(positions), 1)
        marks = {at: -1 if sign else 1 for at, sign in zip(positions, negative, strict=True)}
    else:
        marks = read_levels(body.take(len(body.data)), [(total,)], largest=1)
    gains = [
        np.float32(SIXTH_ROOTS[prod(shape).bit_length() % 6] * 2 ** (prod(shape).bit_length() // 6))
        for shape in shapes
        for _ in range(prod(shape))
    ]
    values = []
    for size, scale in zip(sizes, scales, strict=True):
        start = len(values)
        x = [np.float32(marks.get(start + i, 0)) for i in range(size)]
        for stage in (1, 0):
            x = flipped(turned(x), start, stage, seed)
        with np.errstate(over="ignore"):
            x = [float(number * np.float32(scale)) for number in x]
        values += [max(-LARGEST, min(LARGEST, number)) for number in x]
    pairs = zip(values[:count], gains, strict=True)
    return [float(np.float32(value) / gain) for value, gain in pairs]


def padded_blocks_of(count: int) -> list[int]:
    sizes, rest = [32768] * (count // 32768), count % 32768
    for power in (16384, 8192, 4096, 2048, 1024):
        sizes += [power] * (rest & power > 0)
    rest %= 1024
    powers = (16, 32, 64, 128, 256, 512, 1024)
    return sizes + [min(power for power in powers if power >= rest)] * (rest > 0)


def turned(x: list) -> list:
    half = len(x) // 2
    while half:
        for i in range(len(x)):
            if i // half % 2 == 0:
                a, b = x[i], x[i + half]
                x[i], x[i + half] = a + b, a - b
        half //= 2
    return x


def flipped(x: list, start: int, stage: int, seed: int) -> list:
    out = []
    for i, number in enumerate(x, start):
        bit = random_number(seed, 2 * (i // 64) + stage) >> (i % 64) & 1
        out.append(-number if bit else number)
    return out


def read_factors(body: Body, shapes) -> list[float]:
    rank = int.from_bytes(body.take(2), "little")
    demand(rank > 0, "a rank of 0")
    values = []
    for shape in shapes:
        rows, columns = (shape[0], prod(shape[1:])) if len(shape) > 1 else (0, 0)
        r = min(rank, rows, columns)
        if r == 0 or r * (rows + columns) >= rows * columns:
            values += body.take_floats(prod(shape))
            continue
        p, q = body.take_floats(rows * r), body.take_floats(columns * r)
        demand(all(isfinite(number) for number in p + q), "a factor that is not finite")
        for i in range(rows):
            for j in range(columns):
                total = p[i * r] * q[j * r]
                for k in range(1, r):
                    total += p[i * r + k] * q[j * r + k]
                values.append(round_to_float32(max(-LARGEST, min(LARGEST, total))))
    return values


# --- the coded body -------------------------------------------------------------------------------


def read_tables(body: Body, shapes):
    """What is coded with a table for each tensor that has any level."""
    bits, num_tables = body.take(1)[0], body.take_u32()
    demand(1 <= bits <= 4, "bits")
    demand(num_tables <= sum(prod(shape) > 0 for shape in shapes), "more tables than tensors")
    tables = [body.take_floats(2 ** (bits - 1)) for _ in range(num_tables)]
    levels = read_levels(body.data, shapes, 2 ** (bits - 1))
    positions, groups, start = sorted(levels), [], 0
    for shape in shapes:
        groups.append(sum(start <= p < start + prod(shape) for p in positions))
        start += prod(shape)
    groups = [group for group in groups if group]
    demand(len(groups) == num_tables, "tables and tensors differ")
    return positions, look_up([levels[p] for p in positions], tables, groups)


def read_coded(body: Body, kind: int, shapes):
    if kind == 8:
        return read_tables(body, shapes)
    owners = None
    if kind == 3:
        scales = body.take_floats(1)
    else:
        num_buckets = body.take_u32()
        entries = sum(prod(shape) for shape in shapes)
        demand(num_buckets <= (entries + 511) // 512, "more buckets than there can be")
        scales = body.take_floats(num_buckets)
        counts = struct.unpack(f"<{num_buckets}H", body.take(2 * num_buckets))
        owners = [bucket for bucket, count in enumerate(counts) for _ in range(count)]
    levels = read_levels(body.data, shapes)
    positions = sorted(levels)
    owners = [0] * len(positions) if owners is None else owners
    demand(len(owners) == len(positions), "the counts of the buckets")
    pairs = zip(positions, owners, strict=True)
    return positions, [product(levels[position], scales[owner]) for position, owner in pairs]


def log(n: int) -> int:
    if n == 0:
        return 0
    octave = n.bit_length() - 1
    next_bits = ((n << 4) >> octave) & 15
    return 4 * octave + (0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3)[next_bits]


def clamp(number: int, low: int, high: int) -> int:
    return max(low, min(high, number))


def sign(number: int) -> int:
    return (number > 0) - (number < 0)


def nearness(predicted: int, least: int) -> int:
    size = abs(predicted)
    if size < least:
        return 0 if size == 0 else 1 if 2 * size < least else 2
    return 2 + sum(size - least + 1 >= edge for edge in (1, 2, 3, 5, 7, 10, 16, 26, 51))


def size_class(total: int, least: int) -> int:
    if total == 0:
        return 0
    return sign(total) * (1 + sum(abs(total) >= edge * least for edge in (1, 3, 8)))


def initial_context(name: tuple) -> list[int]:
    """[probability, count, largest count]"""
    if name[0] == "occupied":
        start = (65536, 77936, 92682, 110218)[(name[1] - 43) % 4] >> max(0, (46 - name[1]) // 4)
        return [clamp(min(52429, start), 32, 65504), 6, 126]
    if name[0] == "sign":
        score = 2 * name[1] + name[2] + name[3] // 2
        other = 65536 // (1 + 2 ** abs(score))
        return [clamp(other if score >= 0 else 65536 - other, 32, 65504), 3, 62]
    return [32768, 0, 62]


class RangeDecoder:
    def __init__(self, code: bytes):
        self.code, self.words_read = code, 0
        self.range, self.number = 2**64 - 1, (self.word() << 32) | self.word()
        self.contexts = {}

    def word(self) -> int:
        word = self.code[4 * self.words_read : 4 * self.words_read + 4].ljust(4, b"\0")
        self.words_read += 1
        return int.from_bytes(word, "big")

    def decide(self, probability: int) -> int:
        ones = (self.range >> 16) * probability
        bit = int(self.number < ones)
        if bit:
            self.range = ones
        else:
            self.number -= ones
            self.range -= ones
        if self.range < 2**32:
            self.range <<= 32
            self.number = (self.number << 32) | self.word()
        return bit

    def bit(self, *names: tuple) -> int:
        contexts = [self.contexts.setdefault(name, initial_context(name)) for name in names]
        bit = self.decide(sum(context[0] for context in contexts) // len(contexts))
        for context in contexts:
            goal = 65504 if bit else 32
            context[0] += ((goal - context[0]) * (65536 // (context[1] + 2))) >> 16
            context[1] += context[1] < context[2]
        return bit

    def ending(self) -> bytes:
        """What must stand in the code in place of the last two words read."""
        last = self.code[4 * self.words_read - 8 : 4 * self.words_read].ljust(8, b"\0")
        low = (int.from_bytes(last, "big") - self.number) % 2**64
        for num_bytes in range(9):
            unit = 256 ** (8 - num_bytes)
            number = (low + self.range - 1) // unit * unit
            if number >= low:
                break
        return (number % 2**64).to_bytes(8, "big")[:num_bytes]

    def gamma(self, *banks: tuple) -> int:
        length = 0
        while self.bit(*[(*bank, "length", min(length, 12)) for bank in banks]):
            length += 1
            demand(length <= 30, "a number too long")
        value = 1
        for i in range(length):
            first = [(*bank, "first", min(length, 12)) for bank in banks]
            value = 2 * value + (self.bit(*first) if i == 0 else self.decide(32768))
        return value - 1


def read_varint(data: bytes) -> tuple[int, bytes]:
    number = 0
    for i, byte in enumerate(data[:9]):
        number += (byte & 127) << (7 * i)
        demand(byte > 0 or i == 0, "a varint of more bytes than it needs")
        if byte < 128:
            return number, data[i + 1 :]
    raise Refused("a varint that does not end")


class Stack:
    """The symbols: a number from which they are taken, and words that fill it up."""

    def __init__(self, number: int, data: bytes):
        demand(len(data) % 4 == 0, "words of the stack")
        demand(number >= 2**31 or data == b"", "a stack that begins too low")
        self.number, self.words = number, [data[i : i + 4] for i in range(0, len(data), 4)]
        self.contexts = {}

    def symbol(self, name: tuple, weights: list[int], bits: list[int]) -> tuple[int, int]:
        """(symbol, the bits that follow it, of which there are bits[symbol])"""
        bounds = [32768 * sum(weights[:i]) // sum(weights) for i in range(10)]
        context = self.contexts.setdefault(name, [bounds, 0])
        bounds, seen = context
        place = self.number % 32768
        symbol = max(i for i in range(9) if bounds[i] <= place)
        size = bounds[symbol + 1] - bounds[symbol]
        self.number = size * (self.number // 32768) + place - bounds[symbol]
        following = self.number % 2 ** bits[symbol]
        self.number //= 2 ** bits[symbol]
        if self.number < 2**31 and self.words:
            self.number = self.number * 2**32 + int.from_bytes(self.words.pop(0), "big")
        rate = 3 + seen // 16
        for i in range(1, 9):
            up = 2 ** (15 - rate) - 9 if i > symbol else 0
            bounds[i] += i + up - bounds[i] // 2**rate
        context[1] = min(seen + 1, 48)
        return symbol, following


def read_levels(data: bytes, shapes: list[tuple[int, ...]], largest=32767) -> dict[int, int]:
    """position -> level"""
    count, data = read_varint(data)
    demand(count <= sum(prod(shape) for shape in shapes), "more levels than entries")
    if count == 0:
        demand(data == b"", "bytes left over")
        return {}
    least, data = read_varint(data)
    spread, data = read_varint(data)
    demand(1 <= least and least + spread <= largest, "magnitudes")
    length, data = read_varint(data)
    number, data = read_varint(data)
    demand(length <= len(data), "length of the code")
    code, stack = data[:length], Stack(number, data[length:])
    decoder, levels, earlier, offset = RangeDecoder(code), {}, [], 0
    for shape in shapes:
        grid = grid_of(shape)
        alike = [e[1] for e in earlier if e[0] == grid[:3]]
        inside = read_tensor(decoder, stack, shape, alike, least, spread)
        if inside:
            earlier.append((grid[:3], inside))
        levels |= {offset + place: level for place, level in inside.items()}
        demand(len(levels) <= count, "more levels than announced")
        offset += prod(shape)
    demand(len(levels) == count, "fewer levels than announced")
    ending, start = decoder.ending(), 4 * decoder.words_read - 8
    demand(code[start:] == ending and len(code) == start + len(ending), "end of the code")
    demand(stack.number == 1 and not stack.words, "end of the stack")
    return levels


def grid_of(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """rows, columns, kernel, width of the kernel"""
    if len(shape) < 2:
        return 1, prod(shape), 1, 1
    if len(shape) == 2:
        return shape[1], shape[0], 1, 1
    return shape[0], shape[1], prod(shape[2:]), shape[-1]


def index_of(shape: tuple[int, ...], row: int, column: int, k: int) -> int:
    if len(shape) == 2:
        return column * shape[1] + row
    _, columns, kernel, _ = grid_of(shape)
    return (row * columns + column) * kernel + k


def read_tensor(
    decoder: RangeDecoder, stack: Stack, shape, alike: list[dict], least: int, spread: int
) -> dict[int, int]:
    """index within the tensor -> level"""
    grid = grid_of(shape)
    rows, columns, kernel, _ = grid
    if not decoder.bit(("any", rows == 1)):
        return {}
    demand(rows * columns * kernel > 0, "something in a tensor of no entries")
    if alike and decoder.bit(("copy", rows == 1)):
        back = decoder.gamma(("row", "all"), ("row", 0))
        demand(back < len(alike), "a copy of no tensor")
        return alike[-1 - back]
    levels, num_cells, column_cells = {}, 0, [0] * columns
    column_sums = [0] * columns
    for o in range(rows):
        usual = min(log((num_cells // o if o else 0) + 1) // 2, 11)
        due = decoder.gamma(("row", "all"), ("row", usual))
        demand(due <= columns, "a row with more cells than columns")
        before = list(column_cells)
        row_sum, row_signs = 0, 0
        for i in range(columns):
            left = columns - i
            if due == 0:
                break
            ratio = log(due) + log(2 * before[i] + 1) - log(2 * sum(before[i:]) + left) + 44
            ratio = clamp(ratio, 0, 67)
            if due < left and not decoder.bit(("occupied", ratio)):
                continue
            due, num_cells, column_cells[i] = due - 1, num_cells + 1, column_cells[i] + 1
            places = read_places(stack, grid)
            cell, kernel_signs = [0] * kernel, 0
            for k in places:
                if kernel > 1:
                    predicted = prediction(cell, k, grid)
                    near = nearness(predicted, least)
                    name = ("sign", sign(predicted) * min(near, 4))
                    name += (clamp(kernel_signs, -2, 2), clamp(row_signs, -2, 2))
                    context = ("near", near, min(len(places) // 3, 3))
                else:
                    name = ("flat", size_class(row_sum, least), size_class(column_sums[i], least))
                    context = ("alone", ratio // 8)
                negative, excess = decoder.bit(name), 0
                if spread > 0:
                    weights = [16, 16, 12, 8, 10, 10, 8, 4, 2]
                    symbol, following = stack.symbol(context, weights, [0, 0, 0, 0, 1, 2, 3, 4, 0])
                    excess = [0, 1, 2, 3, 4, 6, 10, 18, 34][symbol] + following
                    if symbol == 8:
                        where = "kernels" if kernel > 1 else "flat tensors"
                        excess += decoder.gamma(("escape", "all"), ("escape", where))
                    demand(excess <= spread, "a level too large")
                level = -(excess + least) if negative else excess + least
                cell[k] = levels[index_of(shape, o, i, k)] = level
                row_sum, column_sums[i] = row_sum + level, column_sums[i] + level
                kernel_signs, row_signs = kernel_signs + sign(level), row_signs + sign(level)
    demand(len(levels) > 0, "nothing in a tensor that holds something")
    return levels


def read_places(stack: Stack, grid) -> list[int]:
    """Which positions of a kernel are set."""
    _, _, kernel, width = grid
    if kernel == 1:
        return [0]
    places, symbols = [], {}
    for row in range(kernel // width):
        for column in range(0, width, 3):
            above, left = symbols.get((row - 1, column), 0), symbols.get((row, column - 3), 0)
            known = left // 2 if column else min(len(places), 3)
            name = ("mask", column > 0, min(row, 2), above, known)
            symbol, _ = stack.symbol(name, [24, 8, 8, 4, 8, 4, 4, 4, 1], [0] * 9)
            demand(symbol < 8, "no such pattern")
            symbols[row, column] = symbol
            found = [column + i for i in range(3) if symbol >> i & 1]
            demand(all(place < width for place in found), "positions of a row")
            places += [row * width + place for place in found]
    demand(len(places) > 0, "positions of a cell")
    return places


def prediction(cell: list[int], k: int, grid) -> int:
    _, _, _, width = grid
    left = cell[k - 1] if k % width else 0
    above = cell[k - width] if k >= width else 0
    corner = cell[k - width - 1] if k % width and k >= width else 0
    return left + above - corner
