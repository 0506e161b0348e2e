"""SGD on flat vectors, of one client or of several, in a form that a CUDA graph can hold."""

from collections.abc import Callable

import torch
from torch import Tensor

from config import Local


def flat_sgd(
    weights: Tensor,
    gradient: Tensor,
    momentum: Tensor | None,  # zeros before a client's first step; None if it has none
    lr: Tensor,
    local: Local,
    correct: Callable[[Tensor, Tensor], None] | None,
    is_active: Tensor | None = None,
) -> None:
    """Decay, correct, clip, momentum, step, as torch.optim.SGD does it; in place.

    All vectors are float32 [n], and lr is [], or they are [L, n] with a client in each row, and lr
    and is_active [L, 1]. Rows that are not active keep their weights and momentum to the bit.
    """
    if local.weight_decay:
        gradient.add_(weights, alpha=local.weight_decay)
    if correct:
        correct(weights, gradient)
    if local.clip:
        clip(gradient, local.clip)
    step = gradient
    if momentum is not None:
        moved = torch.add(gradient, momentum, alpha=local.momentum)
        momentum.copy_(moved if is_active is None else torch.where(is_active, moved, momentum))
        step = gradient.add(moved, alpha=local.momentum) if local.nesterov else moved
    step = step * lr
    # Not torch.where(), which copies a number to the device, and not 0 times what may be NaN.
    weights.sub_(step if is_active is None else step.masked_fill(~is_active, 0.0))


def clip(gradient: Tensor, max_norm: float) -> None:
    """Scale each row down to max_norm if its L2 norm is larger, as torch's clip_grad_norm_ does."""
    norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    # A norm that is NaN must not spread to the gaps between tensors, which hold zeros.
    gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0).nan_to_num(nan=1.0))
