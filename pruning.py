"""Magnitude pruning of updates: which coordinates of a vector are worth sending.

Each function takes a flat float32 vector and returns the kept positions, ascending.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SAMPLE_STRIDE = 61  # a prime, so that the sample does not march in step with any tensor's shape


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
    magnitudes = vector.abs().numpy()
    survivors = np.flatnonzero(magnitudes >= _floor(magnitudes, k))
    if len(survivors) < k:  # the sample was unlucky
        survivors = np.arange(len(magnitudes))
    candidates = magnitudes[survivors]
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


def _floor(magnitudes: np.ndarray, k: int) -> float:
    """A magnitude that at least k entries reach, with high probability, and not many more do."""
    sample = magnitudes[::SAMPLE_STRIDE]
    expected = k * len(sample) / len(magnitudes)
    rank = min(len(sample), math.ceil(expected + 4 * math.sqrt(expected)) + 1)
    return np.partition(sample, len(sample) - rank)[len(sample) - rank]


def _topk_cuda(vector: Tensor, k: int) -> np.ndarray:
    magnitudes = vector.abs()
    kth = torch.topk(magnitudes, k, sorted=True).values[-1]
    above = torch.nonzero(magnitudes > kth).flatten()
    ties = torch.nonzero(magnitudes == kth).flatten()[: k - len(above)]
    return torch.cat((above, ties)).sort().values.cpu().numpy()
