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
from compression import encode
from config import Mask
from federation.downlink import Message
from layout import Layout
from wire.positions import pack_positions


def encode_scores(gradient: Tensor, weights: Tensor, layout: Layout) -> memoryview:
    """snip: what a client sends of every weight, in fp16. Raises NotFinite."""
    return encode(pruning.snip_scores(gradient, weights), layout, "fp16")[0]


class SharedMask:
    """The mask, its versions, and which client has which.

    Every rank holds one and changes it by the same payloads. Version 0 needs no message: it is all
    weights (snip), or drawn from the seed (dynamic).
    """

    def __init__(self, settings: Mask, layout: Layout, rounds: int, seed: int):
        self.settings, self.layout, self.rounds = settings, layout, rounds
        self.version, self.versions = 0, {}  # client: the version that it has; 0 where missing
        self.toggled = np.arange(0)  # the positions at which the version before differs
        self.kept: np.ndarray | None = None  # int64, ascending; None: all weights
        self.left_in = np.zeros(0, np.int32)  # dynamic: the round in which each weight last left
        if settings.method == "dynamic":
            self.left_in = np.zeros(layout.size, np.int32)
            self.kept = pruning.random_mask(layout.shapes, settings.density, seed)

    @property
    def awaits_scores(self) -> bool:
        return self.settings.method == "snip" and self.kept is None

    @property
    def pruned(self) -> Tensor | None:
        """Which weights do not exist, bool [n]; None if all do."""
        if self.kept is None:
            return None
        return torch.ones(self.layout.size, dtype=torch.bool).index_fill_(
            0, torch.from_numpy(self.kept), False
        )

    def gone_since(self, round: int) -> Tensor | None:
        """Which weights do not exist, or left the mask at the end of `round` or later, bool [n]."""
        pruned = self.pruned
        if pruned is None or not len(self.left_in):
            return pruned
        return pruned | torch.from_numpy((self.left_in > 0) & (self.left_in >= round))

    def choose(self, scores: Tensor) -> None:
        """snip: keep the weights with the best of the averaged scores, float32 [n]."""
        self._change(pruning.keep_mask(scores, self.settings.density, self.layout.shapes))

    def grows_in(self, round: int) -> bool:
        """dynamic: whether the mask changes at the end of this round; never after the last."""
        due = round % self.settings.every == 0 and round < self.rounds
        return self.settings.method == "dynamic" and due

    def encode_growth(self, gradient: Tensor, round: int) -> tuple[memoryview, int]:
        """dynamic: a client's largest gradients outside the mask, and how many; bf16 has the range.

        Raises NotFinite.
        """
        shapes, share = self.layout.shapes, self._share(round)
        candidates = pruning.growth_candidates(gradient, self.kept, share, shapes)
        payload, sent = encode(gradient, self.layout, "bf16", lambda *_: candidates)
        return payload, len(sent.values)

    def regrow(self, weights: Tensor, gradient: Tensor, round: int) -> None:
        """dynamic: drop the smallest weights and grow by the clients' averaged gradients."""
        shapes, share = self.layout.shapes, self._share(round)
        before = self.kept
        self._change(pruning.drop_and_grow(before, weights, gradient, share, shapes))
        self.left_in[np.setdiff1d(before, self.kept, assume_unique=True)] = round

    def messages(self, cohort: list[int]) -> dict[int, list[Message]]:
        """What each client lacks: nothing, the last change (or the mask if shorter), the mask."""
        behind = {client: self.version - self.versions.get(client, 0) for client in cohort}
        if not any(behind.values()):
            return {client: [] for client in cohort}
        whole = self._message("mask", self.kept)
        shorter = min(
            whole, self._message("mask_change", self.toggled), key=lambda m: len(m.payload)
        )
        return {
            client: [whole if missed > 1 else shorter] if missed else []
            for client, missed in behind.items()
        }

    def received(self, cohort: list[int]) -> None:
        """The round took place: its cohort has the present version."""
        self.versions |= dict.fromkeys(cohort, self.version)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: tensors and plain values."""
        kept = None if self.kept is None else torch.from_numpy(self.kept)
        toggled = torch.from_numpy(self.toggled)
        versions = {"version": self.version, "versions": self.versions}
        left_in = torch.from_numpy(self.left_in)
        return {"kept": kept, "toggled": toggled, "left_in": left_in, **versions}

    def load(self, state: dict[str, Any]) -> None:
        self.version, self.versions = state["version"], state["versions"]
        self.kept = None if state["kept"] is None else state["kept"].numpy()
        self.toggled, self.left_in = state["toggled"].numpy(), state["left_in"].numpy()

    def _share(self, round: int) -> float:
        return pruning.regrown_share(self.settings.share, round, self.rounds)

    def _change(self, kept: np.ndarray) -> None:
        before = np.arange(self.layout.size) if self.kept is None else self.kept
        self.toggled = np.setxor1d(before, kept, assume_unique=True)
        self.kept, self.version = kept, self.version + 1

    def _message(self, kind: str, positions: np.ndarray) -> Message:
        # A dense system would send nothing in its place.
        return Message(kind, pack_positions(positions, self.layout), len(positions), dense=0)
