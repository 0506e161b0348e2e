"""A stranger's bytes: mutated, cut and extended payloads of every codec and composition.

decode() must refuse each with PayloadError or read what the naive decoder reads, within the memory
of the layout and ten times the time of a valid decode. A longer run:
`PYTHONPATH=.:tests python tests/test_fuzz.py 5000000`.
"""

import sys
import time
import tracemalloc
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from helpers import naive_decoder
from helpers.payloads import SELECTING, WORDS, picking, read_naively, same_bits, seal

from compression import Decoded, decode, encode
from layout import Layout
from wire.container import PayloadError

NUM_PAYLOADS = 208_000  # of the test, all words together
NUM_READ_TWICE = 12  # of a series: one payload in so many goes to the naive decoder too
SMALL = Layout(
    ("conv", "scalar", "empty", "hollow", "bias"), ((3, 5, 2, 2), (), (0, 4), (2, 3, 0), (19,))
)
LONG = Layout(("row", "bias", "hollow"), ((20_000_000,), (30,), (1, 1, 0)))
LONG_WORDS = ["fp16", "int8", "bounded(0.3)"]
FLAT = Layout(("matrix", "bias"), ((24, 25), (3,))).on(np.arange(1, 600))  # over one bucket


def vectors(layout: Layout) -> list[torch.Tensor]:
    """One of noise, and one of few numbers, which compresses well."""
    rng = np.random.default_rng(layout.size)
    noise = rng.standard_normal(layout.size).astype(np.float32)
    steps = np.repeat([1.0, 0.0, -2.0], -(-layout.size // 3))[: layout.size].astype(np.float32)
    return [torch.from_numpy(noise), torch.from_numpy(steps)]


@cache
def valid(word: str) -> list[tuple[bytes, Layout]]:
    """Payloads of a word: each vector with each selection, with and without small tensors apart."""
    layouts = [SMALL, FLAT] if word.startswith(("qsgd", "bounded")) else [SMALL]
    found = {}
    for layout in layouts:
        few = np.array([0, 5, 59]) if layout is SMALL else np.arange(0, 500, 50)
        many = np.arange(0, 60, 2) if layout is SMALL else np.arange(560)
        for indices in (None, few, many, few[:0]) if word in SELECTING else (None,):
            for vector in vectors(layout):
                for dense_below in (0, 20) if layout is SMALL else (0,):
                    payload, _ = encode(vector, layout, word, picking(indices), dense_below)
                    found[bytes(payload)] = layout
    return list(found.items())


def wounds(rng: np.random.Generator):
    """Random numbers below 2^16, drawn in large batches: one at a time they cost a microsecond."""
    while True:
        yield from rng.integers(1 << 16, size=4096).tolist()


BYTES = (0, 1, 2, 3, 8, 0x7F, 0x80, 0xFF)


def wound(payload: bytes, draw) -> bytes:
    """One to three small changes, mostly behind the header and often in the first numbers."""
    changed = bytearray(payload)
    for _ in range(1 + next(draw) % 3):
        last = max(len(changed) - 8, 25)
        kind, place, byte = next(draw) % 16, next(draw) % last, next(draw)
        if kind % 2 and last > 24:
            place = 24 + place % min(last - 24, 24)
        elif kind == 0:
            place = 5 + place % 3  # selection, kind, flags
        byte = BYTES[byte % 8] if byte & 256 else byte >> 8 & 255
        if kind < 7:
            changed[place] = byte
        elif kind < 11:
            changed[place] ^= 1 << byte % 8
        elif kind == 11:
            del changed[place : place + 1 + byte % 4]
        elif kind == 12:
            changed[place:place] = bytes([byte]) * (1 + next(draw) % 40)
        elif kind == 13:
            changed[place : place + 4] = (next(draw) * 65537).to_bytes(4, "little")
        elif kind == 14:
            del changed[max(place, 24) : -8]
        else:
            changed[-8:-8] = bytes(changed[place : place + byte % 9])
    return bytes(changed)


def sealed(payload: bytes) -> bytes:
    """With its length and checksum made right, else the checksum would find every wound."""
    return seal(payload) if len(payload) >= 32 else payload


def attempt(payload: bytes, layout: Layout) -> Decoded | None:
    """What decode() makes of it: refused, or a finite vector on ascending positions."""
    try:
        decoded = decode(payload, layout)
    except PayloadError as error:
        assert "\n" not in str(error)
        return None
    assert decoded.size == layout.size and np.isfinite(decoded.values).all()
    if decoded.indices is None:
        assert len(decoded.values) == layout.size
    elif len(decoded.indices):
        assert len(decoded.values) == len(decoded.indices)
        assert decoded.indices[0] >= 0 and decoded.indices[-1] < layout.size
        assert (np.diff(decoded.indices) > 0).all()
    return decoded


def agree(payload: bytes, layout: Layout, decoded: Decoded | None) -> None:
    """The naive decoder reads the same, or refuses it too."""
    try:
        positions, values = read_naively(payload, layout)
    except naive_decoder.Refused:
        assert decoded is None, payload.hex()
        return
    assert decoded is not None, payload.hex()
    assert same_bits(decoded.values, values), payload.hex()
    found = None if decoded.indices is None else decoded.indices.tolist()
    assert found == positions, payload.hex()


def slowest(payloads: list[tuple[bytes, Layout]]) -> float:
    """CPU seconds of the slowest valid decode, each the best of three."""
    return max(seconds(payload, layout) for payload, layout in payloads)


def seconds(payload: bytes, layout: Layout) -> float:
    times = []
    for _ in range(3):
        begin = time.thread_time()
        attempt(payload, layout)
        times.append(time.thread_time() - begin)
    return min(times)


@cache
def allowed_seconds() -> float:
    """Ten times the slowest valid decode of any codec: a mutation may make one of another."""
    return 10 * slowest([pair for word in WORDS for pair in valid(word)])


def fuzz(word: str, count: int, seed: int) -> Counter:
    """Decode `count` wounded payloads of a word, checksums made right; return what was seen."""
    seen, draw = Counter(), wounds(np.random.default_rng(seed))
    payloads, limit = valid(word), allowed_seconds()
    for i in range(count):
        payload, layout = payloads[i % len(payloads)]
        payload = sealed(wound(payload, draw))
        begin = time.thread_time()
        decoded = attempt(payload, layout)
        if time.thread_time() - begin > limit:
            assert seconds(payload, layout) <= limit, payload.hex()
        seen["refused" if decoded is None else "accepted"] += 1
        if next(draw) % NUM_READ_TWICE == 0:
            agree(payload, layout, decoded)
            seen["read twice"] += 1
    return seen


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("word", WORDS)
def test_wounded_payloads_are_refused_or_read_as_the_page_says(word):
    seen = fuzz(word, NUM_PAYLOADS // len(WORDS), WORDS.index(word))
    assert seen["refused"] > 0 and seen["accepted"] > 0


@pytest.mark.parametrize("word", LONG_WORDS)
def test_wounded_payloads_of_long_rows_are_refused_or_stay_within_them(word):
    vector = torch.zeros(LONG.size)
    few = np.r_[np.arange(0, LONG.size - 100, 1_999_993), LONG.size - 1]
    vector[few] = 1.0
    payload = bytes(encode(vector, LONG, word, picking(few))[0])
    assert attempt(payload, LONG) is not None
    draw = wounds(np.random.default_rng(WORDS.index(word)))
    for _ in range(15):
        attempt(sealed(wound(payload, draw)), LONG)


@pytest.mark.parametrize("word", WORDS)
def test_without_a_right_checksum_nothing_is_accepted(word):
    draw = wounds(np.random.default_rng(0))
    for payload, layout in valid(word):
        for _ in range(20):
            wounded = wound(payload, draw)
            assert wounded == payload or attempt(wounded, layout) is None


@pytest.mark.parametrize("word", WORDS)
def test_every_cut_is_refused_or_what_the_naive_decoder_reads(word):
    for payload, layout in valid(word)[:2]:
        for length in range(24, len(payload) - 8):
            cut = seal(payload[:length] + bytes(8))
            agree(cut, layout, attempt(cut, layout))


def test_wounded_payloads_take_no_memory_beyond_the_layout():
    layout = Layout(("conv", "fc"), ((32, 32, 3, 3), (100, 200)))
    vector = torch.from_numpy(np.random.default_rng(0).standard_normal(layout.size, np.float32))
    draw = wounds(np.random.default_rng(0))
    for word in WORDS:
        few = picking(np.arange(0, layout.size, 50)) if word in SELECTING else None
        for select in {None, few}:
            payload, _ = encode(vector, layout, word, select)
            attempt(payload, layout)
            tracemalloc.start()
            for _ in range(15):
                attempt(sealed(wound(bytes(payload), draw)), layout)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 64 * layout.size + 10 * len(payload)


def main(count: int) -> None:
    """Series of 200 payloads of each word until there are `count`; prints what was seen."""
    for word in LONG_WORDS:
        test_wounded_payloads_of_long_rows_are_refused_or_stay_within_them(word)
    total, series, begin = Counter(), 0, time.thread_time()
    while total["refused"] + total["accepted"] < count:
        for number, word in enumerate(WORDS):
            total += fuzz(word, 200, 1_000_000 + len(WORDS) * series + number)
        series += 1
    print(dict(total), f"in {time.thread_time() - begin:.0f} s, no other outcome")


if __name__ == "__main__":
    main(int(sys.argv[1]))
