"""Where the weights of a narrower network lie in the vector of the whole one.

A narrower network has the first channels of every layer, so each of its tensors is a prefix, in
every dimension, of the same tensor of the whole network (HeteroFL, Diao et al. 2021, arXiv
2010.01264; FjORD, Horvath et al. 2021, arXiv 2102.13451). Narrower slices lie within wider ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from federation.agreement import Agreement
from federation.messages import Broadcast, Message
from layout import Layout

ShareOf = Callable[[int], float]  # the share of the channels that a client has


def slice_positions(whole: Layout, narrow: Layout) -> np.ndarray:
    """The positions in a vector of `whole`, int64 [narrow.size], ascending."""
    parts = [np.arange(0)]
    tensors = zip(whole.offsets[:-1], whole.shapes, narrow.shapes, strict=True)
    for offset, shape, prefix in tensors:
        places = np.arange(int(np.prod(shape))).reshape(shape)
        parts.append(offset + places[tuple(map(slice, prefix))].ravel())
    return np.concatenate(parts)


@dataclass(frozen=True)
class Slice:
    """What one end knows of a width: its agreement with these clients, and its positions.

    positions: int64 [agreement.layout.size], on the device; None for the whole network.
    """

    agreement: Agreement
    positions: Tensor | None

    def cut(self, vector: Tensor) -> Tensor:
        """The part of a whole vector that this width has."""
        return vector if self.positions is None else vector.index_select(0, self.positions)

    def add_to(self, vector: Tensor, part: Tensor, weight: float) -> None:
        """vector += weight * part at the positions, in place."""
        if self.positions is None:
            vector.add_(part, alpha=weight)
        else:  # no position stands twice, so that the order of adding is no matter
            moved = self.cut(vector).add_(part, alpha=weight)
            vector.index_copy_(0, self.positions, moved)

    def outside(self, size: int) -> Tensor | None:
        """Bool [size]: where a whole vector has what this width lacks; None if it lacks nothing."""
        if self.positions is None:
            return None
        marks = torch.ones(size, dtype=torch.bool, device=self.positions.device)
        return marks.index_fill_(0, self.positions, False)


@dataclass(frozen=True)
class SliceBroadcast:
    """What the clients decode: of each share of the channels a Broadcast."""

    by_share: dict[float, Broadcast]
    share_of: ShareOf

    @cached_property
    def messages(self) -> dict[int, list[Message]]:
        """By client."""
        return {
            client: messages
            for broadcast in self.by_share.values()
            for client, messages in broadcast.messages.items()
        }

    def of(self, client: int, copy: Tensor | None = None) -> Broadcast:
        """What this client begins with, see Broadcast.of()."""
        return self.by_share[self.share_of(client)].of(client, copy)
