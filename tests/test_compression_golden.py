"""Payloads stay what they are: every coder's bytes, and what they decode to, are on record.

golden_payloads.json was made by this file before the code was moved into folders
(`PYTHONPATH=. python tests/test_compression_golden.py`). Make it anew only together with a new
version of the wire format, and say why in the commit; a new coder adds its entries to it.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from compression import decode, encode
from layout import Layout
from pruning import topk
from wire.positions import pack_positions

GOLDEN = Path(__file__).parent / "golden_payloads.json"
WORDS = "fp32 fp16 bf16 int2 int4 int8 int16 qsgd2 qsgd4 qsgd8 ternary sign eden1 eden2 eden3 eden4"
WORDS = [*WORDS.split(), "bounded(0.01)", "bounded(0.3)", "powersgd(1)", "powersgd(2)"]
WORDS += ["means2", "means3", "eden(0.05)", "eden(0.5)"]
SHAPES = ((6, 3, 3, 3), (6,), (12, 6, 5, 5), (12, 6, 1, 1), (12,), (40, 48), (40,), (), (0, 3))
LAYOUT = Layout(tuple(f"t{i}" for i in range(len(SHAPES))), SHAPES)


def golden_vector() -> torch.Tensor:
    """Heavy-tailed numbers without a random generator: the same on every machine."""
    noise = np.frombuffer(hashlib.shake_128(b"golden").digest(4 * LAYOUT.size), "<u4")
    return torch.from_numpy(((noise / 2**31 - 1) ** 5).astype(np.float32))


def cases() -> dict[str, tuple[str, float, int]]:
    """Name: (values, density, dense_below)."""
    found = {}
    for word in WORDS:
        for density in (1.0,) if word.startswith(("powersgd", "eden(")) else (1.0, 0.1, 0.01):
            for dense_below in (0, 50):
                found[f"{word} density={density} dense_below={dense_below}"] = (
                    word,
                    density,
                    dense_below,
                )
    return found


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def payload_of(word: str, density: float, dense_below: int) -> bytes:
    def largest(vector: torch.Tensor, layout: Layout) -> np.ndarray:
        return topk(vector, round(density * layout.size))

    select = None if density == 1.0 else largest
    return bytes(encode(golden_vector(), LAYOUT, word, select, dense_below, seed=7)[0])


def record(name: str) -> dict[str, str]:
    payload = payload_of(*cases()[name])
    arrives = decode(payload, LAYOUT).dense().numpy().astype("<f4").tobytes()
    # The QR decomposition of PowerSGD's sender differs between machines; its receiver does not.
    kept = {"payload": payload.hex()} if "powersgd" in name else {"sha256": digest(payload)}
    return {**kept, "length": len(payload), "arrives": digest(arrives)}


def positions() -> dict[str, str]:
    some = topk(golden_vector(), 300)
    masks = {"few": some, "half": np.arange(0, LAYOUT.size, 2), "none": some[:0]}
    return {name: digest(bytes(pack_positions(mask, LAYOUT))) for name, mask in masks.items()}


@pytest.mark.parametrize("name", cases())
def test_payload_and_what_arrives_are_on_record(name):
    golden = json.loads(GOLDEN.read_text())["payloads"][name]
    if "powersgd" not in name:
        assert record(name) == golden
        return
    payload = bytes.fromhex(golden["payload"])
    arrives = decode(payload, LAYOUT).dense()
    assert digest(arrives.numpy().astype("<f4").tobytes()) == golden["arrives"]
    ours = decode(payload_of(*cases()[name]), LAYOUT).dense()
    torch.testing.assert_close(ours, arrives, rtol=1e-4, atol=1e-5)


def test_positions_are_on_record():
    assert positions() == json.loads(GOLDEN.read_text())["positions"]


if __name__ == "__main__":
    found = {"payloads": {name: record(name) for name in cases()}, "positions": positions()}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
