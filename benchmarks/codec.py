"""Bytes and seconds of a sparse update, beside the bounds, NNCodec and plain formats.

    python benchmarks/codec.py [--root ../shared/data] [--rivals PYTHON] [--json] [NAME ...]
    python benchmarks/codec.py --synthetic

Cases: the real updates of updates.py, of all its recipes or of those named (the first run trains
them, for some 15 minutes), and three made ones, each with its 1% and its 0.1% largest entries as
8-bit levels. All coders get the same integers, and every round trip is checked. Rows:

    ours      the payload of compression.encode, container and scale included
    Rice      the same with Rice codes for positions and a byte for each level
    NNCodec   the bitstream of NNCodec 2, without the scale (and its arithmetic code alone); needs
              --rivals, the python of an environment made as requirements-rivals.txt says
    GRACE     int32 positions and float32 values; FedLab: int64 positions and float32 values

The bounds are H(p)/p, bits a nonzero for positions alone, if they were spread independently over
the vector, each layer, each block of 4096 (what tells the densities is not counted). Times are of
one thread: medians over runs in one process, in turn with a memcpy of the vector.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as main.py does

import numpy as np
import torch
from torch import Tensor
from updates import RECIPES, load_updates

from compression import Decoded, decode, encode
from layout import Layout
from pruning import num_kept, topk
from wire.container import pack
from wire.positions import encode_positions

DENSITIES = (0.01, 0.001)
LARGEST_LEVEL = 127
BLOCK = 4096
SMALL = Layout(("conv", "norm", "linear"), ((64, 64, 3, 3), (64,), (10, 500)))
BAR = "resnet18-dense"  # the recipe whose updates the bars are about


@dataclass(frozen=True)
class Case:
    name: str
    layout: Layout
    vector: Tensor  # float32 [layout.size]


@dataclass(frozen=True)
class Integers:
    """What all coders are given: the entries of a vector that are not zero."""

    indices: np.ndarray  # int64 [n], ascending
    levels: np.ndarray  # int32 [n]
    values: np.ndarray  # float32 [n]: what the levels stand for


def compress(vector: Tensor, layout: Layout, density: float) -> tuple[memoryview, Decoded]:
    """Vector to bytes, as a client does it."""
    return encode(vector, layout, "int8", lambda v, _: topk(v, num_kept(density, len(v))))


def cases(root: str, recipes: list[str], synthetic: bool) -> Iterator[Case]:
    if not synthetic:
        for recipe in recipes:
            for update in load_updates(recipe, root):
                vector = torch.from_numpy(update.update)
                yield Case(f"{recipe} {update.moment}", update.layout, vector)
    layout = SMALL if synthetic else load_updates(BAR, root)[0].layout
    rng = np.random.default_rng(0)
    scales = [  # a spread of sizes over rows, over cells and over tensors, as training makes them
        rng.lognormal(0, 1) * rng.lognormal(0, 1.5, (s[0], 1)) * rng.lognormal(0, 1, (s[0], s[1]))
        if len(s) > 1
        else np.ones((1, 1))
        for s in layout.shapes
    ]
    pairs = zip(layout.sizes, scales, strict=True)
    scale = np.concatenate([np.repeat(s.ravel(), size // s.size) for size, s in pairs])
    normal = rng.standard_normal(layout.size)
    made = {"Gaussian": normal, "Laplace": rng.laplace(size=layout.size)}
    for name, numbers in (made | {"clustered": normal * scale}).items():
        yield Case(f"{name}, made", layout, torch.from_numpy(numbers.astype(np.float32)))


# --- bytes ----------------------------------------------------------------------------------------


def integers_of(case: Case, density: float, payload: bytes, sent: Decoded) -> Integers:
    """The integers in our payload, checked against a stable sort and plain rounding."""
    decoded = decode(payload, case.layout)
    np.testing.assert_array_equal(decoded.indices, sent.indices)
    np.testing.assert_array_equal(decoded.values, sent.values)
    magnitudes = case.vector.abs()
    order = torch.sort(magnitudes, descending=True, stable=True).indices  # ties: lowest index
    chosen = order[: num_kept(density, len(magnitudes))].sort().values
    numbers = case.vector[chosen].numpy()
    scale = np.float32(np.abs(numbers).max() / LARGEST_LEVEL)
    levels = np.rint(numbers / scale).astype(np.int32)
    positions = chosen.numpy()[levels != 0]
    np.testing.assert_array_equal(decoded.indices, positions)
    levels = levels[levels != 0]
    assert (np.rint(decoded.values / scale) == levels).all()
    return Integers(decoded.indices, levels, decoded.values)


def bounds(indices: np.ndarray, layout: Layout) -> dict[str, float]:
    """H(p) / p in bits a nonzero: one density for all, for each layer, for each block."""
    blocks = np.arange(0, layout.size + BLOCK, BLOCK).clip(max=layout.size)
    parts = {"global": np.array([0, layout.size]), "layer": layout.offsets, "block": blocks}
    bits = {}
    for name, ends in parts.items():
        counts, sizes = np.diff(np.searchsorted(indices, ends)), np.diff(ends)
        inside = (counts > 0) & (counts < sizes)
        p = counts[inside] / sizes[inside]
        entropy = -p * np.log2(p) - (1 - p) * np.log2(1 - p)
        bits[name] = float((entropy * sizes[inside]).sum() / len(indices))
    return bits


def plain_bytes(given: Integers, layout: Layout) -> dict[str, int]:
    """What simpler formats need, as really packed bytes."""
    scale, levels = np.float32(1).tobytes(), given.levels.astype(np.int8).tobytes()
    rice = pack(0, 0, layout, encode_positions(given.indices, layout), scale, levels)
    values = given.values.tobytes()
    return {
        "rice": len(rice),
        "grace": len(given.indices.astype("<i4").tobytes() + values),
        "fedlab": len(given.indices.astype("<i8").tobytes() + values),
    }


def nncodec(python: str, given: Integers, layout: Layout) -> dict[str, float]:
    """Bytes and seconds of NNCodec, see nncodec_rival.py."""
    script = Path(__file__).with_name("nncodec_rival.py")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "integers.npz"
        shapes = json.dumps(layout.shapes)
        np.savez(file, indices=given.indices, levels=given.levels, shapes=shapes)
        done = subprocess.run([python, script, file], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: NNCodec did not run in {python}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# --- seconds --------------------------------------------------------------------------------------


def times(case: Case, density: float, repeats: int) -> dict[str, float]:
    """Median seconds of each step, the steps taken in turn."""
    vector, layout = case.vector, case.layout
    copy, total = torch.empty_like(vector), torch.zeros_like(vector)
    payload, _ = compress(vector, layout, density)
    k = num_kept(density, len(vector))
    steps: dict[str, Callable[[], object]] = {
        "memcpy": lambda: copy.copy_(vector),
        "select": lambda: topk(vector, k),
        "encode": lambda: compress(vector, layout, density),
        "decode": lambda: decode(payload, layout).add_to(total, 0.1),
        "torch.topk": lambda: torch.topk(vector.abs(), k, sorted=False),
    }
    seconds = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


# --- the table ------------------------------------------------------------------------------------


def measure(case: Case, density: float, rivals: str | None, repeats: int) -> dict:
    """All figures of one case at one density."""
    payload, sent = compress(case.vector, case.layout, density)
    given = integers_of(case, density, payload, sent)
    return {
        "case": case.name,
        "density": density,
        "nonzeros": len(given.levels),
        "bounds": bounds(given.indices, case.layout),
        "bytes": {"ours": len(payload)} | plain_bytes(given, case.layout),
        "nncodec": nncodec(rivals, given, case.layout) if rivals else None,
        "seconds": times(case, density, repeats),
    }


def print_bytes(rows: list[dict]) -> None:
    print("\nBytes; bits a nonzero (ours, and the bounds of positions alone)\n")
    print(
        f"{'case':26} {'p':>5} {'nonzeros':>8} {'ours':>8} {'NNCodec':>8} {'ratio':>6} "
        f"{'its code':>8} {'ratio':>6} {'Rice':>8} {'GRACE':>9} {'FedLab':>9}  "
        f"{'bits':>5} {'global':>6} {'layer':>6} {'block':>6}"
    )
    for row in rows:
        sizes, rival, bits = row["bytes"], row["nncodec"], row["bounds"]
        beside = f"{'-':>8} {'-':>6} {'-':>8} {'-':>6}"
        if rival:
            stream, code = rival["bitstream"], rival["code"]
            beside = f"{stream:8,} {sizes['ours'] / stream:6.3f} "
            beside += f"{code:8,} {sizes['ours'] / code:6.3f}"
        print(
            f"{row['case']:26} {row['density']:5.1%} {row['nonzeros']:8,} {sizes['ours']:8,} "
            f"{beside} {sizes['rice']:8,} {sizes['grace']:9,} {sizes['fedlab']:9,}  "
            f"{8 * sizes['ours'] / row['nonzeros']:5.2f} {bits['global']:6.2f} "
            f"{bits['layer']:6.2f} {bits['block']:6.2f}"
        )


def print_dense(case: Case) -> None:
    size = len(encode(case.vector, case.layout, "int8")[0])
    print(f"{case.name}, all {case.layout.size:,} values: {size:,} bytes as int8, ", end="")
    print(f"{4 * case.layout.size:,} as fp32", flush=True)


def print_seconds(rows: list[dict]) -> None:
    print("\nMilliseconds (in memcpys): vector to bytes, bytes added to a sum\n")
    print(
        f"{'case':26} {'p':>5} {'memcpy':>7} {'select':>12} {'torch.topk':>12} {'encode':>12} "
        f"{'decode':>12} {'NNCodec encode':>15}"
    )
    for row in rows:
        taken, rival = row["seconds"], row["nncodec"]
        steps = [
            f"{1e3 * taken[step]:5.1f} ({taken[step] / taken['memcpy']:4.1f})"
            for step in ("select", "torch.topk", "encode", "decode")
        ]
        print(
            f"{row['case']:26} {row['density']:5.1%} {1e3 * taken['memcpy']:7.1f} "
            + " ".join(f"{step:>12}" for step in steps)
            + (f" {1e3 * rival['bitstream_seconds']:15.0f}" if rival else f" {'-':>15}")
        )


def summary(rows: list[dict]) -> dict[str, float | None]:
    """The figures that have a bar: of the bar's recipe if it is there, else of all rows.

    Bytes and speeds are geometric means over its updates; times are at 1% unless they say more.
    """
    rows = [row for row in rows if row["case"].startswith(BAR)] or rows
    dense, sparse = ([row for row in rows if row["density"] == p] for p in DENSITIES)

    def mean(rows: list[dict], figure: Callable[[dict], float]) -> float | None:
        if any(row["nncodec"] is None for row in rows) and figure in rivals:
            return None
        return math.exp(statistics.mean(math.log(figure(row)) for row in rows))

    def bitstream(row: dict) -> float:
        return row["bytes"]["ours"] / row["nncodec"]["bitstream"]

    def code(row: dict) -> float:
        return row["bytes"]["ours"] / row["nncodec"]["code"]

    def speedup(row: dict) -> float:
        return row["nncodec"]["bitstream_seconds"] / row["seconds"]["encode"]

    rivals = (bitstream, code, speedup)
    return {
        "payload_vs_nncodec_1pct": mean(dense, bitstream),
        "payload_vs_nncodec_0p1pct": mean(sparse, bitstream),
        "payload_vs_nncodec_code_1pct": mean(dense, code),
        "payload_vs_nncodec_code_0p1pct": mean(sparse, code),
        "encode_vs_memcpy": mean(dense, lambda r: r["seconds"]["encode"] / r["seconds"]["memcpy"]),
        "decode_vs_memcpy": mean(dense, lambda r: r["seconds"]["decode"] / r["seconds"]["memcpy"]),
        "select_speedup_vs_topk": mean(
            dense, lambda r: r["seconds"]["torch.topk"] / r["seconds"]["select"]
        ),
        "encode_speedup_vs_nncodec": mean(dense, speedup),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes and seconds of our codec and of others.")
    parser.add_argument("--root", default="../shared/data", help="where CIFAR-10 is")
    parser.add_argument("--rivals", metavar="PYTHON", help="an environment that has nncodec")
    parser.add_argument("--synthetic", action="store_true", help="made vectors only, and small")
    parser.add_argument("--repeats", type=int, default=9, help="runs of every timed step")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), metavar="NAME")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in cases(args.root, args.recipes, args.synthetic):
        print_dense(case)
        rows += [measure(case, density, args.rivals, args.repeats) for density in DENSITIES]
    print_bytes(rows)
    print_seconds(rows)
    if not args.rivals:
        print("\nNNCodec did NOT run: give --rivals PYTHON, see benchmarks/requirements-rivals.txt")
    if args.json:
        print(json.dumps(summary(rows) | {"rows": rows}))


if __name__ == "__main__":
    main()
