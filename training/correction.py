"""What is done to a client's gradients, with every tensor that it reads in view.

A CUDA graph reads the memory that it was recorded with. So a recorded step holds one Correction for
good, and each client's tensors are copied into it.
"""

from copy import copy
from typing import Protocol

import torch
from torch import Tensor


class LocalRound(Protocol):
    """What training needs of the class of that name in algorithms.py."""

    def correct_gradient(self, weights: Tensor, gradient: Tensor) -> None: ...


class Correction:
    """An algorithm's correction of a gradient, but for a client's own norm layers.

    Weights that are pruned get no gradient, and so never leave 0.

    local_round: the algorithm's. Its attributes that are tensors may differ from client to client;
    all else that correct_gradient() reads is the same in a whole run. own: int64, where the
    client's own norm layers lie (FedBN). pruned: bool [n].
    """

    def __init__(self, local_round: LocalRound, own: Tensor | None, pruned: Tensor | None):
        self.local_round, self.own, self.pruned = local_round, own, pruned

    def __call__(self, weights: Tensor, gradient: Tensor) -> None:
        """Correct the gradient in place; both are aligned vectors (FlatModel.aligned)."""
        uncorrected = None if self.own is None else gradient.index_select(0, self.own)
        self.local_round.correct_gradient(weights, gradient)
        if self.own is not None:
            gradient.index_copy_(0, self.own, uncorrected)
        if self.pruned is not None:
            gradient.masked_fill_(self.pruned, 0.0)

    @property
    def kind(self) -> tuple:
        """Equal for two corrections if the tensors of one fit into the other."""
        tensors = [(name, tensor.shape, tensor.dtype) for name, tensor in self._tensors()]
        return type(self.local_round), tuple(tensors)

    def clone(self) -> "Correction":
        """The same with tensors of its own."""
        twin = Correction(copy(self.local_round), self.own, self.pruned)
        for name, tensor in self._tensors():
            setattr(twin if name in ("own", "pruned") else twin.local_round, name, tensor.clone())
        return twin

    def take(self, other: "Correction") -> None:
        """Become the other one, of the same kind, without a change of address."""
        pairs = zip(self._tensors(), other._tensors(), strict=True)
        for (_, mine), (_, theirs) in pairs:
            mine.copy_(theirs)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        named = vars(self.local_round) | {"own": self.own, "pruned": self.pruned}
        return sorted((name, value) for name, value in named.items() if torch.is_tensor(value))


class Held:
    """Corrections that stay where they are: one of each kind that was ever given."""

    def __init__(self):
        self.by_kind: dict[tuple, Correction] = {}

    def take(self, given: Correction | None) -> Correction | None:
        """Return the held correction after it has become the given one; None for None."""
        if given is None:
            return None
        if given.kind not in self.by_kind:
            self.by_kind[given.kind] = given.clone()
        else:
            self.by_kind[given.kind].take(given)
        return self.by_kind[given.kind]
