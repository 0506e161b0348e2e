"""Vectors to send, and what arrives of them."""

import numpy as np
import torch

from compression import encode
from layout import Layout


def flat(count: int) -> Layout:
    """The layout of one tensor of one dimension."""
    return Layout(("w",), ((count,),))


def arrived(
    vector: torch.Tensor, word: str, seed: int = 0, layout: Layout | None = None
) -> torch.Tensor:
    """What a receiver decodes of the vector, float32 [n]."""
    return encode(vector, layout or flat(len(vector)), word, seed=seed)[1].dense()


def noise(count: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers, float32 [count]."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(count, np.float32))
