"""PowerSGD: matrices as two factors of low rank (Vogels et al. 2019, arXiv 1905.13727)."""

import math

import numpy as np

from compiled import compiled, uniform
from layout import Layout
from wire.container import PayloadError, Reader

LARGEST = float(np.finfo(np.float32).max)


@compiled
def _fill(seed, out):
    for k in range(len(out)):
        out[k] = 2 * uniform(seed, k) - 1


def _factors(shape: tuple[int, ...], rank: int) -> tuple[int, int, int]:
    """(rows, columns, rank) of a tensor that travels as two factors; rank is 0 if it does not."""
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (0, 0)
    rank = min(rank, rows, columns)
    return rows, columns, rank if rank * (rows + columns) < rows * columns else 0


def write_powersgd(numbers: np.ndarray, layout: Layout, rank: int, seed: int) -> bytes:
    """Each matrix M [rows, columns] as P = orth(M Q) and M^T P: one power step from a random Q.

    Without the paper's warm start: it needs the same group in each round, which federated
    sampling does not give. Tensors that factors would not shorten go raw.
    """
    parts = [rank.to_bytes(2, "little")]
    for start, shape, size in zip(layout.offsets, layout.shapes, layout.sizes, strict=False):
        rows, columns, low = _factors(shape, rank)
        tensor = numbers[start : start + size]
        if low:
            matrix = tensor.reshape(rows, columns).astype(np.float64)
            random = np.empty(columns * low)
            _fill(np.uint64(seed & 2**64 - 1) + np.uint64(start), random)
            p = np.linalg.qr(matrix @ random.reshape(columns, low))[0].astype("<f4")
            q = np.clip(matrix.T @ p.astype(np.float64), -LARGEST, LARGEST).astype("<f4")
            parts += [p.tobytes(), q.tobytes()]
        else:
            parts.append(tensor.astype("<f4").tobytes())
    return b"".join(parts)


def read_powersgd(reader: Reader, layout: Layout) -> np.ndarray:
    """P Q^T, summed over the rank in order and in float64."""
    rank = int(reader.take("<u2", 1)[0])
    if rank == 0:
        raise PayloadError("a rank of 0")
    out = np.empty(layout.size, np.float32)
    for start, shape, size in zip(layout.offsets, layout.shapes, layout.sizes, strict=False):
        rows, columns, low = _factors(shape, rank)
        if not low:
            out[start : start + size] = reader.take("<f4", size)
            continue
        p, q = reader.take("<f4", rows * low), reader.take("<f4", columns * low)
        if not (np.isfinite(p).all() and np.isfinite(q).all()):
            raise PayloadError("a factor is not finite")
        p, q = p.reshape(rows, low).astype(np.float64), q.reshape(columns, low).astype(np.float64)
        total = p[:, :1] * q[:, 0]
        for r in range(1, low):
            total += p[:, r : r + 1] * q[:, r]
        out[start : start + size] = np.clip(total, -LARGEST, LARGEST).reshape(-1)
    return out
