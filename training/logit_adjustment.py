"""Logit adjustment: a client with few pictures of a class does not unlearn it.

Menon et al. 2021 (arXiv 2007.07314), eq. 10: the loss sees each class's logit plus tau times the
log of its prior, here of its share in the client's own shard. A class that the client lacks then
has next to no gradient. Without this much of what clients of unequal classes send is about their
own shares, and cancels in the average.
"""

import torch
from torch import Tensor


def adjustment(labels: Tensor, num_classes: int, tau: float) -> Tensor:
    """What is added to the logits while a client trains, float32 [num_classes].

    labels: int64 [n], of the client's pictures. Each class counts with one picture more than there
    are, so that no share is zero.
    """
    classes = torch.arange(num_classes, device=labels.device)
    counts = (labels[:, None] == classes).sum(0)
    return tau * ((counts + 1) / (len(labels) + num_classes)).log()
