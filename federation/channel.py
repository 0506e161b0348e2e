"""One direction of the wire: which coordinates travel, in which bits, and what stays owed.

support (coordinates both ends know: a shared mask, a random choice) x selection (coordinates that
the sender picks) x values (compression.py) x small tensors whole, and error feedback around it.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import pruning
from compression import Decoded, NotFinite, all_finite, decode, encode
from config import Downlink, Selection, Uplink
from layout import Layout
from wire.container import Memory, new_memory

State = dict[str, Tensor]
ALL = -1  # stands for a client in what goes to all: its random choices are no client's


class Channel:
    """Encodes and decodes the vectors of one direction; both ends hold an equal one."""

    def __init__(
        self,
        layout: Layout,
        selection: Selection,
        link: Uplink | Downlink,
        unbiased: bool,
        seed_for: Callable[..., int],
    ):
        """unbiased: a random choice is scaled by 1 / density, so that its mean is the vector."""
        self.layout, self.selection, self.link = layout, selection, link
        self.unbiased, self.seed_for = unbiased, seed_for
        self.use_mask(None)

    def use_mask(self, mask: np.ndarray | None) -> None:
        """From now on only these coordinates exist, int64, ascending; None: all of them."""
        self.mask, self.on_mask = mask, self.layout if mask is None else self.layout.on(mask)

    def encode(
        self, vector: Tensor, round: int, client: int = ALL, memory: Memory = new_memory
    ) -> tuple[memoryview, Decoded]:
        """The payload of float32 [layout.size] and what decode() makes of it. Raises NotFinite."""
        support, layout, scale = self._support(round, client)
        if support is not None and not all_finite(vector):  # nor may what is owed hold NaN
            raise NotFinite("the vector holds inf or NaN")
        part = vector if support is None else vector[torch.from_numpy(support)].mul_(scale)
        link, seed = self.link, self.seed_for("values", round, client)
        select = self._select(round, client)
        payload, sent = encode(part, layout, link.values, select, link.dense_below, seed, memory)
        return payload, self._lift(sent, support)

    def decode(self, payload: bytes | memoryview, round: int, client: int = ALL) -> Decoded:
        """Raises PayloadError."""
        support, layout, _ = self._support(round, client)
        return self._lift(decode(payload, layout), support)

    @property
    def num_coordinates(self) -> int:
        """How many coordinates exist."""
        return self.layout.size if self.mask is None else len(self.mask)

    def density(self, round: int, client: int) -> float:
        """The share of coordinates that this client sends in this round."""
        densities = getattr(self.selection, "client_densities", None) or [self.selection.density]
        density = densities[client % len(densities)]
        stage = 1 + (round - 1) // self.selection.warmup_rounds
        return pruning.density_at(density, self.selection.warmup, stage)

    def _support(self, round: int, client: int) -> tuple[np.ndarray | None, Layout, float]:
        """(coordinates that both ends know, the layout on them, what their values are scaled by)"""
        if self.selection.method != "random":
            return self.mask, self.on_mask, 1.0
        size = self.num_coordinates
        k = pruning.num_kept(self.density(round, client), size)
        chosen = pruning.random(size, k, self.seed_for("selection", round, client))
        support = chosen if self.mask is None else self.mask[chosen]
        return support, self.layout.on(support), size / k if self.unbiased else 1.0

    def _select(self, round: int, client: int) -> Callable[[Tensor, Layout], np.ndarray] | None:
        """How the sender picks coordinates of the support; None if all of them travel."""
        settings, density = self.selection, self.density(round, client)
        if settings.method in ("none", "random"):
            return None
        if settings.method == "threshold":
            return lambda v, _: pruning.threshold(v, settings.threshold, settings.relative)
        return {
            "global": lambda v, _: pruning.topk(v, pruning.num_kept(density, len(v))),
            "layer": lambda v, layout: pruning.topk_per_layer(v, density, layout.offsets),
            "chunk": lambda v, _: pruning.topk_per_chunk(v, density, settings.chunk),
        }[settings.scope]

    def _lift(self, decoded: Decoded, support: np.ndarray | None) -> Decoded:
        """From positions within the support to positions in the vector."""
        if support is None:
            return decoded
        inside = support if decoded.indices is None else support[decoded.indices]
        return Decoded(self.layout.size, inside, decoded.values)


class ErrorFeedback:
    """What a client owes: the part of its updates that has not been received yet.

    Seide et al. 2014; Karimireddy et al. 2019 (arXiv 1901.09847). With decay b, b * owed + update
    is sent, and what was not sent is owed next time. A client keeps it while it is not sampled,
    however long. An update that is refused or lost is owed again in full.

    momentum > 0 is DGC's correction (Lin et al. 2018, arXiv 1712.01887, eq. 4): a velocity
    u = m * u + update is what accumulates, and where something was sent u starts again from zero.
    """

    def __init__(self, decay: float, momentum: float):
        self.decay, self.momentum = decay, momentum

    def add(self, update: Tensor, state: State) -> State:
        """Turn `update` into all that is owed, in place; return the state without the residual."""
        after = {}
        if self.momentum:
            if "velocity" in state:
                update.add_(state["velocity"], alpha=self.momentum)
            after["velocity"] = update.clone()
        if "residual" in state:
            update.add_(state["residual"], alpha=self.decay)
        return after

    def subtract(self, owed: Tensor, sent: Decoded, after: State) -> State:
        """The client's new state: owed - sent, in place."""
        sent.add_to(owed, -1.0)
        if self.momentum:
            where = slice(None) if sent.indices is None else torch.from_numpy(sent.indices)
            after["velocity"][where] = 0
        return after | {"residual": owed}
