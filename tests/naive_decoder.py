"""A second decoder, written from docs/wire-format.md alone: plain Python, one bit at a time.

It knows none of our modules, so that the page, the coder and this decoder check each other.
"""

import struct
from hashlib import blake2b
from math import isfinite, prod

import xxhash


class Refused(Exception):
    pass


def demand(condition: bool, what: str) -> None:
    if not condition:
        raise Refused(what)


def decode(payload: bytes, tensors: list[tuple[str, tuple[int, ...]]]):
    """Return (positions or None for all, values): ints and floats that are float32 numbers."""
    demand(len(payload) >= 32, "too short")
    demand(payload[0:4] == b"FLUP", "magic")
    demand(payload[4] == 1, "version")
    demand(payload[5] in (0, 1, 2), "selection")
    demand(payload[6] in {0: (0, 1, 2, 3), 1: (0, 1, 2), 2: (3,)}[payload[5]], "values")
    demand(payload[7] == 0, "reserved byte")
    demand(payload[8:16] == fingerprint(tensors), "layout")
    demand(int.from_bytes(payload[16:24], "little") == len(payload) - 32, "length")
    demand(payload[-8:] == xxhash.xxh3_64_digest(payload[:-8])[::-1], "checksum")

    body = Body(payload[24:-8])
    sizes = [prod(shape) for _, shape in tensors]
    if payload[5] == 2:
        (scale,) = struct.unpack("<f", body.take(4))
        levels = read_levels(body.data, [shape for _, shape in tensors])
        positions = sorted(levels)
        demand(all(abs(level) <= 127 for level in levels.values()), "a level beyond 127")
        values = [round_to_float32(levels[position] * scale) for position in positions]
    else:
        positions, counts = read_positions(body, sizes) if payload[5] else (None, sizes)
        values = read_values(body, payload[6], counts)
        demand(body.data == b"", "bytes left over")
    demand(all(isfinite(value) for value in values), "not finite")
    return positions, values


def fingerprint(tensors) -> bytes:
    text = ";".join(name + ":" + ",".join(str(n) for n in shape) for name, shape in tensors)
    return blake2b(text.encode("utf-8"), digest_size=8).digest()


class Body:
    def __init__(self, data: bytes):
        self.data = data

    def take(self, count: int) -> bytes:
        demand(count <= len(self.data), "the body is too short")
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def take_u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

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


def read_values(body: Body, kind: int, counts: list[int]) -> list[float]:
    total = sum(counts)
    if kind == 0:
        return list(struct.unpack(f"<{total}f", body.take(4 * total)))
    if kind == 1:
        return list(struct.unpack(f"<{total}e", body.take(2 * total)))
    if kind == 2:
        halves = struct.unpack(f"<{total}H", body.take(2 * total))
        return [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]
    filled = [count for count in counts if count > 0]
    scales = struct.unpack(f"<{len(filled)}f", body.take(4 * len(filled)))
    values = []
    for scale, count in zip(scales, filled, strict=True):
        levels = struct.unpack(f"{count}b", body.take(count))
        values += [round_to_float32(level * scale) for level in levels]
    return values


def round_to_float32(number: float) -> float:
    try:  # 8 bits times 24 bits are exact in a double, so this is the only rounding
        return struct.unpack("<f", struct.pack("<f", number))[0]
    except OverflowError:
        return float("inf")


# --- the coded body -------------------------------------------------------------------------------


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


def follow(mean: int, value: int, count: int, slowest: int) -> int:
    return value if count == 0 else mean + ((value - mean) >> min(count, slowest))


def initial_context(name: tuple) -> list[int]:
    """[probability, count, largest count]"""
    if name[0] == "occupied":
        start = (65536, 77936, 92682, 110218)[(name[1] - 43) % 4] >> max(0, (46 - name[1]) // 4)
        return [clamp(min(52429, start), 32, 65504), 6, 126]
    if name[0] == "mask":
        return [(13107, 29491, 29491, 45875)[2 * name[3] + name[4]], 4, 62]
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

    def gamma(self, slots: int, *banks: tuple) -> int:
        length = 0
        while self.bit(*[(*bank, "length", min(length, slots)) for bank in banks]):
            length += 1
            demand(length <= 30, "a number too long")
        value = 1
        for i in range(length):
            first = [(*bank, "first", min(length, slots)) for bank in banks]
            value = 2 * value + (self.bit(*first) if i == 0 else self.decide(32768))
        return value - 1


def read_varint(data: bytes) -> tuple[int, bytes]:
    number = 0
    for i, byte in enumerate(data[:5]):
        number += (byte & 127) << (7 * i)
        if byte < 128:
            return number, data[i + 1 :]
    raise Refused("a varint that does not end")


def read_levels(data: bytes, shapes: list[tuple[int, ...]]) -> dict[int, int]:
    """position -> level"""
    count, data = read_varint(data)
    least, data = read_varint(data)
    demand(count <= sum(prod(shape) for shape in shapes), "more levels than entries")
    demand(1 <= least <= 32767, "least magnitude")
    if count == 0:
        demand(data == b"", "bytes left over")
        return {}
    decoder, levels, earlier, offset = RangeDecoder(data), {}, [], 0
    for shape in shapes:
        grid = grid_of(shape)
        inside = read_tensor(decoder, shape, [e[1] for e in earlier if e[0] == grid[:3]], least)
        if inside:
            earlier.append((grid[:3], inside))
        levels |= {offset + place: level for place, level in inside.items()}
        demand(len(levels) <= count, "more levels than announced")
        offset += prod(shape)
    demand(len(levels) == count, "fewer levels than announced")
    demand(data[4 * decoder.words_read - 8 :] == decoder.ending(), "end of the code")
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


def read_tensor(decoder: RangeDecoder, shape, alike: list[dict], least: int) -> dict[int, int]:
    """index within the tensor -> level"""
    grid = grid_of(shape)
    rows, columns, kernel, _ = grid
    if not decoder.bit(("any", rows == 1)):
        return {}
    if alike and decoder.bit(("copy", rows == 1)):
        back = decoder.gamma(12, ("row", "all"), ("row", 0))
        demand(back < len(alike), "a copy of no tensor")
        return alike[-1 - back]
    levels, num_cells, column_cells = {}, 0, [0] * columns
    column_sums = [0] * columns
    tensor_mean = tensor_count = 0
    for o in range(rows):
        usual = min(log((num_cells // o if o else 0) + 1) // 2, 11)
        due = decoder.gamma(12, ("row", "all"), ("row", usual))
        demand(due <= columns, "a row with more cells than columns")
        before = list(column_cells)
        row_mean, row_count, row_sum, row_signs = tensor_mean, 0, 0, 0
        for i in range(columns):
            left = columns - i
            if due == 0:
                break
            ratio = log(due) + log(2 * before[i] + 1) - log(2 * sum(before[i:]) + left) + 44
            ratio = clamp(ratio, 0, 67)
            if due < left and not decoder.bit(("occupied", ratio)):
                continue
            due, num_cells, column_cells[i] = due - 1, num_cells + 1, column_cells[i] + 1
            mask = read_mask(decoder, grid)
            cell = [0] * kernel
            kernel_mean, kernel_count, kernel_signs = tensor_mean, 0, 0
            for k in [k for k in range(kernel) if mask[k]]:
                if kernel > 1:
                    predicted, after = neighbourhood(cell, mask, k, grid)
                    near = nearness(predicted, least)
                    name = ("sign", sign(predicted) * min(near, 4))
                    name += (clamp(kernel_signs, -2, 2), clamp(row_signs, -2, 2))
                    a = ("near", near, after)
                    means = min((log(kernel_mean) + log(row_mean)) // 4, 15)
                    b = ("means", means, min(sum(mask) // 3, 3))
                else:
                    name = ("flat", size_class(row_sum, least), size_class(column_sums[i], least))
                    a = ("alone", ratio // 4)
                    b = ("means", min(log(row_mean) // 2, 15), 3)
                negative = decoder.bit(name)
                excess = decoder.gamma(7, a, b)
                demand(excess + least <= 32767, "a level too large")
                level = -(excess + least) if negative else excess + least
                cell[k] = levels[index_of(shape, o, i, k)] = level
                row_sum, column_sums[i] = row_sum + level, column_sums[i] + level
                kernel_signs, row_signs = kernel_signs + sign(level), row_signs + sign(level)
                kernel_mean = follow(kernel_mean, 16 * excess + 1, kernel_count, 1)
                row_mean = follow(row_mean, 16 * excess + 1, row_count, 4)
                tensor_mean = follow(tensor_mean, 16 * excess + 1, tensor_count, 5)
                kernel_count, row_count = kernel_count + 1, row_count + 1
                tensor_count += 1
    return levels


def read_mask(decoder: RangeDecoder, grid) -> list[int]:
    _, _, kernel, width = grid
    mask = [0] * kernel
    for k in range(kernel):
        left = mask[k - 1] if k % width else 0
        above = mask[k - width] if k >= width else 0
        implied = sum(mask) == 0 and k == kernel - 1
        name = ("mask", min(k, 15), min(sum(mask), 7), left, above)
        mask[k] = 1 if implied else decoder.bit(name)
    return mask


def neighbourhood(cell: list[int], mask: list[int], k: int, grid) -> tuple[int, int]:
    """The level predicted at k, and how many of the positions right and below are set."""
    _, _, kernel, width = grid
    left = cell[k - 1] if k % width else 0
    above = cell[k - width] if k >= width else 0
    predicted = left + above
    if k % width and k >= width:
        predicted = (3 * (left + above) - 2 * cell[k - width - 1]) // 4
    right = mask[k + 1] if (k + 1) % width else 0
    below = mask[k + width] if k + width < kernel else 0
    return predicted, right + below
