"""One direction of the wire: which coordinates travel, in which bits, and what stays owed.

support (coordinates that both ends know: a shared mask, a random choice) x selection (coordinates
that the sender picks) x values (compression.py) x small tensors whole, and error feedback around
it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

import pruning
from compression import (
    Coder,
    Decoded,
    Memory,
    NotFinite,
    all_finite,
    composition,
    decode,
    encode,
    new_memory,
    pack_positions,
    parse_coder,
    to_device,
    unpack_positions,
)
from config import Config, Selection
from federation.client_store import State
from federation.messages import Report
from federation.phases import within
from layout import Layout

ALL = -1  # stands for a client in what goes to all clients: its random choices are no client's
EVERYTHING = Selection(method="none")
Select = Callable[[Tensor, Layout], np.ndarray]


class Channel:
    """Encodes and decodes the vectors of one kind of message; both ends hold an equal one.

    values: the coder's word, see compression.py. dense_below: smaller tensors travel whole.
    seed_for: (purpose, round_number, client) -> seed. owes: what is lost of a vector is part of a
    later one (error feedback, a sum that both ends keep). Then nothing may be sent larger than it
    is on average: a random choice is not scaled by 1 / density, as it is elsewhere so that its mean
    is the vector, and a coder of relative variance w >= 1 is damped by 1 / (1 + w), which makes it
    a contraction (Beznosikov et al. 2020, arXiv 2002.12410); otherwise what is owed would grow
    without end. sender_picks: encode() is given a selection of its own. client_bits: the coder's
    number for client i is client_bits[i % how many], if any.
    """

    def __init__(
        self,
        layout: Layout,
        values: str,
        selection: Selection = EVERYTHING,
        dense_below: int = 0,
        seed_for: Callable[..., int] = lambda *_: 0,
        owes: bool = False,
        sender_picks: bool = False,
        client_bits: Sequence[float] = (),
    ):
        self.layout, self.coder, self.selection = layout, parse_coder(values), selection
        self.dense_below, self.seed_for, self.owes = dense_below, seed_for, owes
        self.sender_picks, self.client_bits = sender_picks, client_bits
        self.use_mask(None)

    def use_mask(self, mask: np.ndarray | None) -> None:
        """From now on only the coordinates at `mask` exist, int64, ascending; None means all."""
        self.mask, self.on_mask = mask, self.layout if mask is None else self.layout.on(mask)

    def encode(
        self,
        vector: Tensor,
        round_number: int,
        client: int = ALL,
        memory: Memory = new_memory,
        select: Select | None = None,  # picks in place of the channel's own selection
    ) -> tuple[memoryview, Decoded]:
        """The payload of float32 [layout.size] and what decode() makes of it. Raises NotFinite."""
        support, layout, scale = self._support(round_number, client)
        if support is not None and not all_finite(vector):  # nor may what is owed hold NaN
            raise NotFinite("the vector holds inf or NaN")
        part = vector
        if support is not None:
            part = vector[to_device(support, vector.device)]
            part.mul_(scale if isinstance(scale, float) else to_device(scale, part.device))
        select = _timed(select or self._select(round_number, client))
        coder, seed = self._coder_of(client), self.seed_for("values", round_number, client)
        payload, sent = encode(part, layout, coder, select, self.dense_below, seed, memory)
        return payload, self._lift(sent, support, coder)

    def decode(self, payload: bytes | memoryview, round_number: int, client: int = ALL) -> Decoded:
        """The vector as it arrives. Raises PayloadError, also for what was not agreed on."""
        support, layout, _ = self._support(round_number, client)
        most = self._most_selected(round_number, client, layout)
        coder = self._coder_of(client)
        decoded = decode(payload, layout, coder, most, self.dense_below)
        return self._lift(decoded, support, coder)

    def describe(self, report: Report, round_number: int) -> None:
        """Note in the report what the bytes of its last message are, which encode() has written."""
        with within("evaluate"):
            _, layout, _ = self._support(round_number, report.client)
            described = composition(report.messages[-1].payload, layout, self.coder)
            report.bytes_by_part, report.bytes_by_tensor = described

    @property
    def num_coordinates(self) -> int:
        """How many coordinates exist."""
        return self.layout.size if self.mask is None else len(self.mask)

    def density(self, round_number: int, client: int) -> float:
        """The share of coordinates that this client, or a server, sends in this round."""
        density, of_clients = (
            self.selection.density,
            getattr(self.selection, "client_densities", []),
        )
        if of_clients and client >= 0:
            density = of_clients[client % len(of_clients)]
        stage = 1 + (round_number - 1) // self.selection.warmup_rounds
        return pruning.density_at(density, self.selection.warmup, stage)

    def _support(
        self, round_number: int, client: int
    ) -> tuple[np.ndarray | None, Layout, float | np.ndarray]:
        """(coordinates that both ends know, the layout on them, what their values are scaled by)"""
        if self.selection.method != "random":
            return self.mask, self.on_mask, 1.0
        size = self.num_coordinates
        k = pruning.num_kept(self.density(round_number, client), size)
        draws_for = ALL if getattr(self.selection, "shared", False) else client
        seed, scale = self.seed_for("selection", round_number, draws_for), size / k
        if self.selection.scope == "layer":
            chosen, scale = pruning.random_by_layer(self.on_mask.sizes, k, seed)
        else:
            chosen = pruning.random(size, k, seed)
        support = chosen if self.mask is None else self.mask[chosen]
        return support, self.layout.on(support), 1.0 if self.owes else scale

    def _select(self, round_number: int, client: int) -> Select | None:
        """How the sender picks coordinates of the support; None means that all of them travel."""
        settings, density = self.selection, self.density(round_number, client)
        if settings.method in ("none", "random"):
            return None
        if settings.method == "threshold":
            return lambda v, _: pruning.threshold(v, settings.threshold, settings.relative)
        return {
            "global": lambda v, _: pruning.topk(v, pruning.num_kept(density, len(v))),
            "layer": lambda v, layout: pruning.topk_per_layer(v, density, layout.offsets),
            "chunk": lambda v, _: pruning.topk_per_chunk(v, density, settings.chunk),
        }[settings.scope]

    def _most_selected(self, round_number: int, client: int, layout: Layout) -> int | None:
        """How many positions the sender may pick at most; None if it picks none."""
        settings, density = self.selection, self.density(round_number, client)
        if self.sender_picks or settings.method == "threshold":
            return layout.size
        if settings.method in ("none", "random"):
            return None
        sizes = {
            "global": [layout.size],
            "layer": layout.sizes.tolist(),
            "chunk": [
                min(settings.chunk, layout.size - start)
                for start in range(0, layout.size, settings.chunk)
            ],
        }[settings.scope]
        return sum(pruning.num_kept(density, size) for size in sizes)

    def _coder_of(self, client: int) -> Coder:
        """How this client, or a server, writes values; to read eden(R) nobody needs its R."""
        if self.client_bits and client >= 0:
            return type(self.coder)(self.client_bits[client % len(self.client_bits)])
        return self.coder

    def _lift(self, decoded: Decoded, support: np.ndarray | None, coder: Coder) -> Decoded:
        """From positions within the support to positions in the vector, and damped."""
        indices, values = decoded.indices, decoded.values
        if support is not None:
            indices = support if indices is None else support[indices]
        if self.owes and not coder.contractive:
            values = values * np.float32(1 / (1 + coder.variance))
        return Decoded(self.layout.size, indices, values)


def _timed(select: Select | None) -> Select | None:
    """The same selection, whose time counts as a phase of its own."""
    if select is None:
        return None

    def timed(vector: Tensor, layout: Layout) -> np.ndarray:
        with within("select"):
            return select(vector, layout)

    return timed


class PositionChannel:
    """Encodes and decodes ascending int64 positions: what a mask, or its change, travels as."""

    def __init__(self, layout: Layout):
        self.layout = layout

    def encode(self, positions: np.ndarray) -> memoryview:
        return pack_positions(positions, self.layout)

    def decode(self, payload: bytes | memoryview) -> np.ndarray:
        """Raises PayloadError."""
        return unpack_positions(payload, self.layout)

    def use_mask(self, mask: np.ndarray | None) -> None:
        """Positions are those of all coordinates, whatever the mask."""


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
        after: State = {}
        device = update.device  # a state that has been spilled lies elsewhere
        if self.momentum:
            if "velocity" in state:
                update.add_(state["velocity"].to(device), alpha=self.momentum)
            after["velocity"] = update.clone()
        if "residual" in state:
            update.add_(state["residual"].to(device), alpha=self.decay)
        return after

    def subtract(self, owed: Tensor, sent: Decoded, after: State) -> State:
        """The client's new state, in which what was sent is subtracted from `owed`, in place."""
        sent.add_to(owed, -1.0)
        if self.momentum:
            where = slice(None) if sent.indices is None else torch.as_tensor(sent.indices)
            after["velocity"][where] = 0
        return after | {"residual": owed}


def error_feedback(config: Config) -> ErrorFeedback | None:
    """The error feedback of the uplink; None if nothing can be owed."""
    up = config.uplink
    lossless = config.pruning.method == "none" and up.values == "fp32"
    if not up.error_feedback or lossless and not up.momentum:
        return None
    return ErrorFeedback(up.decay, up.momentum)
