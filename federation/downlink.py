"""How the model reaches the clients: whole, or as the compressed changes that each has missed.

Both ways have send(parameters, round, cohort), which has no effect until commit(): a round that is
given up has sent nothing.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from federation.channel import Channel
from wire.container import OVERHEAD


@dataclass(frozen=True)
class Message:
    """A payload of a kind; it carries `numbers` and stands for `dense` numbers of 4 bytes."""

    kind: str
    payload: bytes | memoryview
    numbers: int
    dense: int


class WholeModel:
    """Each client receives the whole model in each round; kind: of the messages."""

    def __init__(self, channel: Channel, kind: str = "model"):
        self.channel, self.kind = channel, kind

    def send(
        self, parameters: Tensor, round: int, cohort: list[int]
    ) -> tuple[Tensor, dict[int, list[Message]]]:
        """Return the model as the clients decode it, float32 [n], and each client's messages."""
        payload, _ = self.channel.encode(parameters, round)
        received = self.channel.decode(payload, round)
        message = Message(self.kind, payload, len(received.values), len(parameters))
        return received.dense(copy=False), {client: [message] for client in cohort}

    def commit(self) -> None:
        """The round took place."""

    def use_mask(self, mask: np.ndarray) -> None:
        """From now on only these coordinates exist, int64, ascending."""
        self.channel.use_mask(mask)

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass


class Changes:
    """The server sends what its model has moved by since the last message, compressed.

    `shared` is the model as an up-to-date client has it; what compression lost of one change is
    part of the next, so this is error feedback on the downlink (EF21-P, Gruntkowska et al. 2023,
    arXiv 2209.15218, eq. 6). A client that took no part for a while receives the changes that it
    missed, one by one, or the whole of `shared` in fp32, whichever is shorter. kind: of a message
    with the whole; one with a change is of kind <kind>_change.
    """

    def __init__(self, channel: Channel, whole: Channel, parameters: Tensor, kind: str = "model"):
        self.channel, self.whole, self.kind = channel, whole, kind
        self.shared = parameters.clone()
        self.changes: dict[int, Message] = {}  # by round: the newest, together below the model
        self.versions: dict[int, int] = {}  # client: the round whose model it has
        self.sent: tuple[Tensor, dict[int, Message], dict[int, int]] | None = None

    def send(
        self, parameters: Tensor, round: int, cohort: list[int]
    ) -> tuple[Tensor, dict[int, list[Message]]]:
        """Return the model as the clients decode it, float32 [n], and each client's messages."""
        payload, _ = self.channel.encode(parameters - self.shared, round)
        change = self.channel.decode(payload, round)
        shared = self.shared.clone()
        change.add_to(shared)
        size = len(parameters)
        newest = Message(f"{self.kind}_change", payload, len(change.values), size)
        changes = self.changes | {round: newest}
        changes = _newest(changes, OVERHEAD + 4 * self.whole.num_coordinates)
        messages = {c: _missed(changes, self.versions.get(c), round) for c in cohort}
        if not all(messages.values()):
            payload, _ = self.whole.encode(shared, round)
            model = Message(self.kind, payload, self.whole.num_coordinates, size)
            messages = {client: missed or [model] for client, missed in messages.items()}
        self.sent = shared, changes, dict.fromkeys(cohort, round)
        return shared, messages

    def commit(self) -> None:
        """The round took place."""
        self.shared, self.changes, received = self.sent
        self.versions |= received
        self.sent = None

    def use_mask(self, mask: np.ndarray) -> None:
        """From now on only these coordinates exist, int64, ascending; both ends drop the others.

        An up-to-date client goes on with the next change. The earlier ones are of no more use.
        """
        self.channel.use_mask(mask)
        self.whole.use_mask(mask)
        shared, self.shared, self.changes = self.shared, torch.zeros_like(self.shared), {}
        self.shared[torch.from_numpy(mask)] = shared[torch.from_numpy(mask)]

    def state(self) -> dict[str, Any]:
        """For a checkpoint: tensors and plain values."""
        changes = {
            round: vars(m) | {"payload": torch.frombuffer(bytearray(m.payload), dtype=torch.uint8)}
            for round, m in self.changes.items()
        }
        return {"shared": self.shared, "changes": changes, "versions": self.versions}

    def load(self, state: dict[str, Any]) -> None:
        self.shared, self.versions = state["shared"], state["versions"]
        self.changes = {
            round: Message(**m | {"payload": m["payload"].numpy().tobytes()})
            for round, m in state["changes"].items()
        }


def _newest(changes: dict[int, Message], limit: int) -> dict[int, Message]:
    """The newest changes that are together no longer than `limit` bytes."""
    kept, total = {}, 0
    for round in sorted(changes, reverse=True):
        total += len(changes[round].payload)
        if total > limit:
            break
        kept[round] = changes[round]
    return kept


def _missed(changes: dict[int, Message], version: int | None, round: int) -> list[Message]:
    """The changes from a client's version to this round; none if the model must go whole."""
    if version is None or version + 1 not in changes:
        return []
    *missed, newest = (changes[number] for number in range(version + 1, round + 1))
    # In their place a dense system would send one model: the earlier ones stand for nothing.
    return [*(replace(message, dense=0) for message in missed), newest]
