"""Pruning of the model itself: one mask says which weights exist, and both ends know it.

snip: before round 1 its cohort scores all weights of the first model, the server averages the
scores and keeps the best for good (Lee et al. 2019, arXiv 1810.02340). dynamic: a random mask from
the run's seed; every n rounds the smallest weights give way to those outside the mask with the
largest gradients (RigL, Evci et al. 2020, arXiv 1911.11134; FedDST, Bibikar et al. 2022, arXiv
2112.09824). Only values on the mask travel; the mask itself travels where a client lacks it.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

import pruning
from config import Mask
from layout import Layout


class SharedMask:
    """One end's copy of the mask. The first one needs no message: it is all weights (snip), or
    drawn from the seed (dynamic).

    Attributes: kept: int64, ascending, the weights that exist; pruned: bool [n], those that do not,
    to be read only; both None if all exist.
    """

    def __init__(self, settings: Mask, layout: Layout, rounds: int, seed: int):
        self.settings, self.layout, self.rounds = settings, layout, rounds
        self.version = 0  # how many changes there have been
        dynamic = settings.method == "dynamic"
        self._keep(pruning.random_mask(layout.shapes, settings.density, seed) if dynamic else None)

    def _keep(self, kept: np.ndarray | None) -> None:
        self.kept, self.pruned = kept, None
        if kept is not None:
            self.pruned = torch.ones(self.layout.size, dtype=torch.bool)
            self.pruned.index_fill_(0, torch.from_numpy(kept), False)

    @property
    def awaits_scores(self) -> bool:
        """snip: whether the mask is still to be chosen."""
        return self.settings.method == "snip" and self.kept is None

    def change(self, kept: np.ndarray) -> np.ndarray:
        """Take the next version; return the positions that left, int64, ascending."""
        before, self.version = self.positions(), self.version + 1
        self._keep(kept)
        return np.setdiff1d(before, kept, assume_unique=True)

    def positions(self) -> np.ndarray:
        """The weights that exist, int64, ascending."""
        return np.arange(self.layout.size) if self.kept is None else self.kept

    def grows_in(self, round_number: int) -> bool:
        """dynamic: whether the mask changes at the end of this round; never after the last."""
        due = round_number % self.settings.every == 0 and round_number < self.rounds
        return self.settings.method == "dynamic" and due

    def growth_candidates(self, gradient: Tensor, round_number: int) -> np.ndarray:
        """dynamic: where outside the mask a client's gradients, float32 [n], are the largest."""
        share = self._regrown_share(round_number)
        return pruning.growth_candidates(gradient, self.kept, share, self.layout.shapes)

    def regrown(self, weights: Tensor, gradient: Tensor, round_number: int) -> np.ndarray:
        """dynamic: the next mask, from the clients' averaged gradients, float32 [n]."""
        share, shapes = self._regrown_share(round_number), self.layout.shapes
        return pruning.drop_and_grow(self.kept, weights, gradient, share, shapes)

    def _regrown_share(self, round_number: int) -> float:
        return pruning.regrown_share(self.settings.share, round_number, self.rounds)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: tensors and plain values."""
        kept = None if self.kept is None else torch.from_numpy(self.kept)
        return {"kept": kept, "version": self.version}

    def load(self, state: dict[str, Any]) -> None:
        self.version = state["version"]
        self._keep(None if state["kept"] is None else state["kept"].numpy())


class MaskHistory:
    """The server's record of which client has which version of the mask."""

    def __init__(self):
        self.version_of: dict[int, int] = {}  # client: the version that it has; 0 where missing
        self.last_change = np.arange(0)  # the positions at which the version before differs

    def record_change(self, before: np.ndarray, kept: np.ndarray) -> None:
        """The mask went from one to the other, both int64, ascending."""
        self.last_change = np.setxor1d(before, kept, assume_unique=True)

    def missed(self, cohort: list[int], version: int) -> dict[int, int]:
        """How many changes each client of the cohort has missed."""
        return {client: version - self.version_of.get(client, 0) for client in cohort}

    def record_received(self, cohort: list[int], version: int) -> None:
        """The round took place, so its cohort has the present version."""
        self.version_of |= dict.fromkeys(cohort, version)

    def state(self) -> dict[str, Any]:
        return {
            "version_of": self.version_of,
            "last_change": torch.from_numpy(self.last_change),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.version_of, self.last_change = state["version_of"], state["last_change"].numpy()
