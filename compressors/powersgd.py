"""powersgd(R): matrices as two factors of rank R.

PowerSGD (Vogels et al. 2019, arXiv 1905.13727).
"""

import math

import numpy as np

from compiled import compiled, uniform
from compressors.coder import DENSE, LARGEST, Body, Coder, Words
from layout import Layout
from wire.container import PayloadError


class PowerSgd(Coder):
    """Each matrix M [rows, columns] as P = orth(M Q) and M^T P: one power step from a random Q.

    Without the paper's warm start: it needs the same group in each round, which federated
    sampling does not give. Tensors that factors would not shorten go raw. P P^T is a projection;
    of |M|^2 it keeps at least R / columns in the mean over Q, which prefers no column.
    """

    words = Words("powersgd({})", 1, 65535)
    bits_per_value = 32
    kind = 7
    contractive, keeps_norms, ruins_models = True, True, True
    takes_selection = False

    def encode(self, values, indices, layout, seed) -> Body:
        rank = self.number.to_bytes(2, "little")
        return Body(DENSE, self.kind, b"", rank + self.write(values, layout, seed))

    def write(self, values: np.ndarray, layout: Layout, seed: int) -> bytes:
        parts = []
        for start, shape, size in zip(layout.offsets, layout.shapes, layout.sizes, strict=False):
            rows, columns, low = _factors(shape, self.number)
            tensor = values[start : start + size]
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

    def decode(self, reader, flags, layout, count) -> np.ndarray:
        rank = int(reader.take("<u2", 1)[0])
        if rank == 0:
            raise PayloadError("a rank of 0")
        if self.number not in (None, rank):
            raise PayloadError(f"a rank of {rank}, and {self} was agreed on")
        out = np.empty(layout.size, np.float32)
        for start, shape, size in zip(layout.offsets, layout.shapes, layout.sizes, strict=False):
            rows, columns, low = _factors(shape, rank)
            if not low:
                out[start : start + size] = reader.take("<f4", size)
                continue
            p, q = reader.take("<f4", rows * low), reader.take("<f4", columns * low)
            if not (np.isfinite(p).all() and np.isfinite(q).all()):
                raise PayloadError("a factor is not finite")
            p, q = p.reshape(rows, low), q.reshape(columns, low).T
            p, q = (np.array(factor, order="C") for factor in (p, q))  # aligned, unlike the payload
            _product(p, q, np.empty(columns), out[start : start + size].reshape(rows, columns))
        return out


@compiled
def _product(p, q, sums, out):
    """out = p @ q in float64, each sum from the left, clamped to the range of float32.

    p: float32 [rows, low]; q: float32 [low, columns]; sums: float64 [columns], to work on.
    """
    for i in range(len(p)):
        for r in range(len(q)):
            factor = np.float64(p[i, r])
            for j in range(len(sums)):
                product = factor * np.float64(q[r, j])
                sums[j] = sums[j] + product if r else product
        for j in range(len(sums)):
            out[i, j] = min(max(sums[j], -LARGEST), LARGEST)


@compiled
def _fill(seed, out):
    for k in range(len(out)):
        out[k] = 2 * uniform(seed, k) - 1


def _factors(shape: tuple[int, ...], rank: int) -> tuple[int, int, int]:
    """(rows, columns, rank) of a tensor that travels as two factors; rank is 0 if it does not."""
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (0, 0)
    rank = min(rank, rows, columns)
    return rows, columns, rank if rank * (rows + columns) < rows * columns else 0
