"""Magnitude pruning of updates: which coordinates of a vector are worth sending.

Each function takes a flat float32 vector and returns the kept positions, ascending.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

SAMPLE_STRIDE = 61  # a prime, so that the sample does not march in step with any tensor's shape
BLOCK = 64  # entries that are looked at together; most blocks hold nothing large
MAGNITUDE_BITS = 0x7FFFFFFF  # a float32 without its sign: as integers these order as magnitudes do


def _compiled(function):
    """numba's machine code: compiled in a second at first use, then loaded where it can be kept."""
    options = {"_nrt": False, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither __pycache__ nor the user's cache folder can be written
        return njit(**options)(function)


def num_kept(density: float, size: int) -> int:
    """How many of `size` coordinates a density keeps: rounded up, so that at least one goes."""
    exact = round(density * size, 6)  # 0.07 * 100 is 7.000000000000001
    return min(size, max(1, math.ceil(exact)))


def topk(vector: Tensor, k: int) -> np.ndarray:
    """The positions of the k largest magnitudes, int64 [k], ascending; ties go to the lowest index.

    The same set as torch.topk(vector.abs(), k). On a CPU a floor guessed from a sample throws out
    nearly everything in one pass, and only the survivors are ranked: about memory speed.
    """
    if k >= vector.numel():
        return np.arange(vector.numel())
    if vector.is_cuda:
        return _topk_cuda(vector, k)
    numbers = np.ascontiguousarray(vector.numpy())
    survivors = np.empty(len(numbers), np.int64)  # untouched pages cost nothing
    survivors = survivors[: _gather(numbers, _floor(numbers, k), survivors)]
    if len(survivors) < k:  # the sample was unlucky
        survivors = np.arange(len(numbers))
    candidates = numbers.view(np.int32)[survivors] & MAGNITUDE_BITS
    kth = np.partition(candidates, len(candidates) - k)[len(candidates) - k]
    keep = candidates > kth
    ties = np.flatnonzero(candidates == kth)[: k - int(keep.sum())]
    keep[ties] = True
    return survivors[keep]


def topk_per_layer(vector: Tensor, density: float, offsets: Sequence[int]) -> np.ndarray:
    """topk of each tensor on its own; offsets: int [num_tensors + 1] into the vector."""
    kept = [
        start + topk(vector[start:stop], num_kept(density, stop - start))
        for start, stop in zip(offsets[:-1], offsets[1:], strict=True)
    ]
    return np.concatenate(kept)


def threshold(vector: Tensor, limit: float) -> np.ndarray:
    """The positions with abs(value) > limit, int64, ascending."""
    return np.flatnonzero(vector.abs().cpu().numpy() > limit)


def _floor(numbers: np.ndarray, k: int) -> np.float32:
    """A magnitude that at least k entries reach, with high probability, and not many more do."""
    sample = np.abs(numbers[::SAMPLE_STRIDE])
    expected = k * len(sample) / len(numbers)
    rank = min(len(sample), math.ceil(expected + 4 * math.sqrt(expected)) + 1)
    return np.partition(sample, len(sample) - rank)[len(sample) - rank]


@_compiled
def _gather(numbers, floor, out):
    """Write the positions whose magnitude is not below floor (so NaN too); return how many.

    numbers: float32 [n]; out: int64 [n]. A position is written always and counted only if it
    stays: without branches the compiler takes many entries at once.
    """
    count = 0
    full = len(numbers) - len(numbers) % BLOCK
    for begin in range(0, full, BLOCK):
        any_stays = False
        for j in range(BLOCK):
            any_stays |= not abs(numbers[begin + j]) < floor
        if any_stays:
            for j in range(begin, begin + BLOCK):
                out[count] = j
                count += not abs(numbers[j]) < floor
    for j in range(full, len(numbers)):
        out[count] = j
        count += not abs(numbers[j]) < floor
    return count


def _topk_cuda(vector: Tensor, k: int) -> np.ndarray:
    magnitudes = vector.abs()
    kth = torch.topk(magnitudes, k, sorted=True).values[-1]
    above = torch.nonzero(magnitudes > kth).flatten()
    ties = torch.nonzero(magnitudes == kth).flatten()[: k - len(above)]
    return torch.cat((above, ties)).sort().values.cpu().numpy()


def density_at(density: float, warmup: Sequence[float], round: int) -> float:
    """The density of a round, counted from 1: warmup[0], warmup[1], ..., then `density`."""
    return warmup[round - 1] if round <= len(warmup) else density
