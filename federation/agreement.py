"""What both ends know before the first message: the algorithm, the mask, and the kinds of messages.

The server and the clients each build an Agreement from the config and never look into each other:
all that passes between them is a payload of one of the kinds in the table below.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from algorithms import make_algorithm
from config import Config, Downlink, Selection, Uplink
from federation.channel import Channel, PositionChannel
from federation.mask import SharedMask
from federation.messages import Buffer, Message
from layout import Layout

WHOLE = "fp32"  # the coder of what is neither pruned nor quantised


@dataclass(frozen=True)
class Kind:
    """One kind of message, in one direction."""

    direction: str  # up or down
    name: str
    channel: Channel | PositionChannel
    dense_values: int  # float32 values that a system without compression sends in its place


class Agreement:
    """One end's view of what was agreed.

    layout, buffer_layout: of the parameters and of the norm layers' buffers, without gaps.
    dense_values: parameters that a system without compression sends; None: those of the layout.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        buffer_layout: Layout,
        dense_values: int | None = None,
    ):
        self.config, self.layout, self.buffer_layout = config, layout, buffer_layout
        self.dense_values = layout.size if dense_values is None else dense_values
        self.algorithm = make_algorithm(config.local.algorithm, **config.local.options)
        self.mask = SharedMask(config.pruning.mask, layout, config.rounds, config.seed_for("mask"))
        self.sends_buffers = config.model.norm_policy == "average" and buffer_layout.size > 0
        self._kinds = {(kind.direction, kind.name): kind for kind in self._table()}
        self._tell_channels()

    def _table(self) -> Iterator[Kind]:
        """All kinds of messages that this run may send."""
        config, algorithm, size = self.config, self.algorithm, self.dense_values
        up, down = config.uplink, config.downlink
        owes = up.error_feedback or algorithm.owes
        yield self._vector("up", "update", config.pruning, up, owes)
        if algorithm.up:  # both ends keep the sum of what was sent, so what is lost is owed
            yield self._vector("up", algorithm.up, config.pruning, up, owes=True)
        for name in filter(None, ("model", algorithm.down)):
            if down.mode == "model":
                yield self._vector("down", name, down.pruning, down, owes=False)
            else:
                if down.mode == "change":  # all of it, where a client missed more
                    yield Kind("down", name, Channel(self.layout, WHOLE), size)
                change = self._vector("down", name, down.pruning, down, owes=True)
                yield Kind("down", f"{name}_change", change.channel, size)
        for direction in ("up", "down"):
            channel = Channel(self.buffer_layout, WHOLE)
            yield Kind(direction, "buffers", channel, self.buffer_layout.size)
        # A system without compression would send nothing in place of what makes a mask.
        yield Kind("up", "scores", Channel(self.layout, "fp16"), 0)
        yield Kind("up", "growth", Channel(self.layout, "bf16", sender_picks=True), 0)
        for name in ("mask", "mask_change"):
            yield Kind("down", name, PositionChannel(self.layout), 0)

    def _vector(
        self,
        direction: str,
        name: str,
        selection: Selection,
        settings: Uplink | Downlink,
        owes: bool,
    ) -> Kind:
        def seed_for(purpose: str, *rest: int) -> int:
            return self.config.seed_for(f"{name}/{purpose}", *rest)

        channel = Channel(
            self.layout,
            settings.values,
            selection,
            settings.dense_below,
            seed_for,
            owes,
            client_bits=settings.client_bits if isinstance(settings, Uplink) else (),
        )
        return Kind(direction, name, channel, self.dense_values)

    def channel(self, direction: str, name: str) -> Channel | PositionChannel:
        """Raises KeyError for a kind that this run does not send."""
        return self._kinds[direction, name].channel

    def message(
        self,
        direction: str,
        name: str,
        sender: int,
        receiver: int,
        payload: Buffer,
        num_values: int,
    ) -> Message:
        """A payload of that kind as a message."""
        dense_values = self._kinds[direction, name].dense_values
        return Message(name, sender, receiver, payload, len(payload), num_values, dense_values)

    def use_mask(self, kept: np.ndarray) -> np.ndarray:
        """From now on only the weights at `kept` exist; return those that left, int64, ascending.

        The channels are told here; whoever holds another vector over the coordinates sets what
        left it to zero.
        """
        left = self.mask.change(kept)
        self._tell_channels()
        return left

    def load_mask(self, state: dict[str, Any]) -> None:
        """Go on with the mask of a checkpoint, see SharedMask.state()."""
        self.mask.load(state)
        self._tell_channels()

    def _tell_channels(self) -> None:
        """Tell the channels which weights exist; what makes masks looks at all of them."""
        for kind in self._kinds.values():
            if kind.channel.layout is self.layout and kind.name not in ("scores", "growth"):
                kind.channel.use_mask(self.mask.kept)
