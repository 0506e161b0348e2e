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
    demand(payload[5] in (0, 1), "selection")
    demand(payload[6] in (0, 1, 2, 3), "values")
    demand(payload[7] == 0, "reserved byte")
    demand(payload[8:16] == fingerprint(tensors), "layout")
    demand(int.from_bytes(payload[16:24], "little") == len(payload) - 32, "length")
    demand(payload[-8:] == xxhash.xxh3_64_digest(payload[:-8])[::-1], "checksum")

    body = Body(payload[24:-8])
    sizes = [prod(shape) for _, shape in tensors]
    positions, counts = None, sizes
    if payload[5] == 1:
        positions, counts = read_positions(body, sizes)
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
