"""What decode() costs at worst, in a process of its own: prints JSON, the cost of each payload.

The peak of the resident memory is the kernel's figure (Linux), set back before each payload.
"""

import json
import re
import struct
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch

from compression import decode, encode, unpack_positions
from compressors import rotated
from compressors.eden import Eden
from layout import Layout
from wire.container import PayloadError, compress, pack
from wire.entropy import encode_integers
from wire.positions import encode_positions

SHAPES = ((512, 512, 3, 3),) * 4 + ((256, 256, 3, 3),) * 2 + ((1000, 512),) + ((512,),) * 8
LAYOUT = Layout(tuple(f"t{i}" for i in range(len(SHAPES))), SHAPES)  # 11.1 million entries
SMALL = Layout(("w", "b"), ((40, 8, 3, 3), (4,)))
LIMIT = 1000  # tensors of fewer entries are apart

Case = tuple[str, bytes | memoryview, Callable[[bytes], object], bytes | memoryview]


def every_position(vector: torch.Tensor, layout: Layout) -> np.ndarray:
    return np.arange(layout.size)


def cases() -> Iterator[Case]:
    """(name, a stranger's payload, how it is decoded, an encoder's of as many values)."""
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(LAYOUT.size, np.float32))
    size, whole = LAYOUT.size, np.arange(LAYOUT.size)
    rice = encode_positions(whole, LAYOUT)

    @cache
    def valid(word: str, select=every_position, dense_below: int = 0) -> memoryview:
        return encode(noise, LAYOUT, word, select, dense_below)[0]

    def agreed(word: str, selected: int | None = size, dense_below: int = 0) -> Callable:
        return lambda payload: decode(payload, LAYOUT, word, selected, dense_below)

    def as_any(payload: bytes) -> object:
        return decode(payload, LAYOUT)

    fp16 = pack(1, 1, LAYOUT, rice, bytes(2 * size))
    yield "rice positions, fp16", fp16, agreed("fp16"), valid("fp16")
    yield "rice positions, fp16, top-k", fp16, agreed("fp16", size // 100), valid("fp16")
    huge = np.full(size, 3.4e38, "<f4").tobytes()
    yield "a sum that overflows", pack(1, 0, LAYOUT, rice, huge), as_any, valid("fp32")
    positions = pack(4, 0, LAYOUT, rice)
    yield "positions alone", positions, lambda payload: unpack_positions(payload, LAYOUT), fp16

    large = LAYOUT.sizes >= LIMIT
    rest = LAYOUT.where(large)
    ones = encode_integers(np.arange(rest.size), np.ones(rest.size, np.int16), rest)
    packet = compress(bytes(Eden.packet_size(1, rest, rest.size)))
    head = struct.pack("<I", LIMIT) + bytes(4 * (size - rest.size)) + struct.pack("<I", len(ones))
    eden = pack(3, 6, LAYOUT, head, ones, b"\1", packet, flags=3)
    yield "coded positions, eden", eden, as_any, valid("eden1", dense_below=LIMIT)
    for word in ("int8", "qsgd8", "fp16"):
        apart = valid(word, dense_below=LIMIT)
        yield f"{word}, all selected", apart, agreed(word, size, LIMIT), apart
    for kind, num_scales, word in ((3, 1, "ternary"), (4, len(SHAPES), "int16"), (5, -1, "qsgd8")):
        num_scales = -(-size // 512) if num_scales < 0 else num_scales
        packet = compress(bytes(4 * num_scales + 2 * size))
        yield (
            f"kind {kind}",
            pack(0, kind, LAYOUT, b"\x10", packet, flags=1),
            as_any,
            valid(word, None),
        )
    packet = compress(bytes(4 * 8 * len(SHAPES) + -(-size * 4 // 8)))
    means = pack(0, 8, LAYOUT, b"\x04", packet, flags=1)
    yield "kind 8", means, as_any, valid("means4", None)
    blocks = rotated.blocks(size)
    padded = Layout(("rotated",), ((int(blocks.sum()),),))
    marks = np.ones(padded.size, np.int16)
    marks = encode_integers(np.arange(padded.size), marks, padded)
    marked = pack(0, 9, LAYOUT, bytes(8 + 2 * len(blocks)) + b"\1", marks)
    yield "kind 9", marked, as_any, valid("eden(1)", None)  # any rate is read
    yield "a rank of 220", high_rank(), agreed("powersgd(4)", None), valid("powersgd(4)", None)


def high_rank() -> memoryview:
    """A payload of powersgd with factors of a rank that no agreement has named."""
    body = struct.pack("<H", 220)
    for shape in SHAPES:
        rows, columns = shape[0], int(np.prod(shape[1:]))
        low = min(220, rows, columns)
        factors = low * (rows + columns) < rows * columns and len(shape) > 1
        body += bytes(4 * (low * (rows + columns) if factors else rows * columns))
    return pack(0, 7, LAYOUT, body)


def status(key: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def cost(decoding: Callable[[bytes], object], payload: bytes) -> tuple[int, float, bool]:
    """(peak of memory in bytes, the best CPU seconds of two, whether it was refused)."""
    peak, seconds, refused = 0, [], False
    for _ in range(2):
        Path("/proc/self/clear_refs").write_text("5")
        before, begin = status("VmRSS"), time.thread_time()
        try:
            decoding(payload)
        except PayloadError:
            refused = True
        seconds.append(time.thread_time() - begin)
        peak = max(peak, status("VmHWM") - before)
    return peak, min(seconds), refused


def main() -> None:
    torch.set_num_threads(1)
    for word in (
        "fp16",
        "int8",
        "qsgd8",
        "means4",
        "eden1",
        "powersgd(1)",
        "eden(1)",
    ):  # compiles, or loads
        for select in (None, every_position) if "(" not in word else (None,):
            for dense_below in (0, 10):
                decode(encode(torch.ones(SMALL.size), SMALL, word, select, dense_below)[0], SMALL)
    found = {}
    for name, payload, decoding, valid in cases():
        peak, seconds, refused = cost(decoding, payload)
        usual = cost(lambda payload: decode(payload, LAYOUT), valid)[1]
        vectors = peak / (4 * LAYOUT.size)
        found[name] = {"vectors": vectors, "seconds": seconds, "valid": usual, "refused": refused}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
