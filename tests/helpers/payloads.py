"""Vectors to encode, payloads to wound, and a second reader of both."""

import numpy as np
import torch
import xxhash
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from helpers import naive_decoder
from layout import Layout

WORDS = "fp32 fp16 bf16 int2 int4 int8 int16 qsgd2 qsgd4 qsgd8 ternary sign eden1 eden2 eden3 eden4"

WORDS = [
    *WORDS.split(),
    "means2",
    "means4",
    "bounded(0.01)",
    "bounded(0.3)",
    "powersgd(1)",
    "powersgd(2)",
    "eden(0.05)",
    "eden(0.5)",
]

SELECTING = [word for word in WORDS if not word.startswith(("powersgd", "eden("))]

CODED = [word for word in SELECTING if not word.startswith(("fp", "bf", "eden"))]


def picking(indices):
    """A selection that takes these positions, whatever the vector."""
    return None if indices is None else lambda vector, layout: np.asarray(indices, np.int64)


def same_bits(ours, theirs) -> bool:
    a, b = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    return a.shape == b.shape and (a.view(np.uint32) == b.view(np.uint32)).all()


def read_naively(payload: bytes, layout: Layout):
    tensors = list(zip(layout.names, layout.shapes, strict=True))
    return naive_decoder.decode(bytes(payload), tensors, layout.agreed)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)

moderate = st.floats(-8, 8, width=32)

denormal = st.floats(-(2.0**-130), 2.0**-130, width=32)

ties = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 127.0, 254.0, 3.0])


@st.composite
def cases(draw):
    """A layout with scalars and empty tensors, a vector of one character, a selection."""
    dims = st.lists(st.integers(0, 6), max_size=3)
    shapes = tuple(map(tuple, draw(st.lists(dims, min_size=1, max_size=4))))
    layout = Layout(tuple(f"t{i}" for i in range(len(shapes))), shapes)
    elements = draw(st.sampled_from([finite, moderate, denormal, ties]))
    vector = draw(arrays(np.float32, layout.size, elements=elements))
    chosen = draw(st.none() | arrays(np.bool_, layout.size))
    return torch.from_numpy(vector), layout, chosen


def mutate(payload: bytes, rng: np.random.Generator) -> bytes:
    """One to three small wounds, mostly behind the header and often in the counts."""
    wounded = bytearray(payload)
    for _ in range(rng.integers(1, 4)):
        last = max(len(wounded) - 8, 25)
        place = int(rng.integers(24, min(last, 46)) if rng.random() < 0.5 else rng.integers(last))
        byte = (0, 1, 2, 0x7F, 0x80, 0xFF, int(rng.integers(256)))[rng.integers(7)]
        wound = rng.integers(6)
        if wound == 0:
            wounded[place] = byte
        elif wound == 1:
            wounded[place] ^= 1 << int(rng.integers(8))
        elif wound == 2:
            del wounded[place : place + int(rng.integers(1, 5))]
        elif wound == 3:
            wounded[place:place] = bytes([byte]) * int(rng.integers(1, 40))
        elif wound == 4:
            wounded[place : place + 4] = int(rng.integers(2**32)).to_bytes(4, "little")
        else:  # swap two bytes
            other = int(rng.integers(last))
            wounded[place], wounded[other] = wounded[other], wounded[place]
    return bytes(wounded)


def seal(payload: bytes) -> bytes:
    """The payload with its body length and checksum made right."""
    inside = payload[:16] + (len(payload) - 32).to_bytes(8, "little") + payload[24:-8]
    return inside + xxhash.xxh3_64_intdigest(inside).to_bytes(8, "little")
