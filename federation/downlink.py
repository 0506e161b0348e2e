"""How the model reaches the clients: whole, or as the compressed changes that each has missed.

All modes have send(vector, round_number, cohort), which has no effect until commit(): a round that
is given up has sent nothing.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compression import OVERHEAD
from federation.agreement import Agreement
from federation.allowance import Allowance
from federation.channel import Select
from federation.messages import SERVER, Message, Report
from federation.phases import within
from pruning import threshold

Sent = tuple[Tensor, dict[int, list[Message]]]
Bring = Callable[[int, Tensor | None], tuple[Tensor, Message]]


class DownlinkMode:
    """What all modes have in common."""

    def to_each(self, vector: Tensor, round_number: int) -> Bring | None:
        """What brings each client a copy of its own, see Broadcast.bring; None: all have the same.

        vector: float32 [n], what a client's copy should become.
        """
        return None

    def observe(self, reports: list[Report], round_number: int) -> None:
        """The reports of a round are there, also those of clients that failed."""

    def commit(self, received: list[int]) -> None:
        """The round took place, and these clients have what they were sent."""

    def forget(self, left: Tensor) -> None:
        """The weights at these positions have left the mask: int64."""

    def state(self) -> dict[str, Any]:
        """For a checkpoint: tensors and plain values."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""


class WholeModel(DownlinkMode):
    """Each client receives the whole vector in each round; kind: of the messages."""

    def __init__(self, agreement: Agreement, kind: str = "model"):
        self.agreement, self.kind = agreement, kind
        self.channel = agreement.channel("down", kind)

    def send(self, vector: Tensor, round_number: int, cohort: list[int]) -> Sent:
        """Return the vector as the clients decode it, float32 [n], and each client's messages."""
        payload, received = self.channel.encode(vector, round_number)
        num_values = len(received.values)
        messages = {
            client: [self.agreement.message("down", self.kind, SERVER, client, payload, num_values)]
            for client in cohort
        }
        return received.to(vector.device).dense(copy=False), messages


class Changes(DownlinkMode):
    """The server sends what its vector has moved by since the last message, compressed.

    `shared` is the vector as an up-to-date client has it; what compression lost of one change is
    part of the next, so this is error feedback on the downlink (EF21-P, Gruntkowska et al. 2023,
    arXiv 2209.15218, eq. 6). A client that took no part for a while receives the changes that it
    missed, one by one, or the whole of `shared` in fp32, whichever is shorter. The first vector
    needs no message: each end has it from the run's seed. kind: of a message with the whole; one
    with a change is of kind <kind>_change.
    """

    def __init__(self, agreement: Agreement, vector: Tensor, kind: str = "model"):
        self.agreement, self.kind = agreement, kind
        self.channel = agreement.channel("down", f"{kind}_change")
        self.whole = agreement.channel("down", kind)
        self.shared = vector.clone()
        self.changes: dict[int, Message] = {}  # by round: the newest, together below the model
        self.version_of: dict[int, int] = {}  # client: the round whose vector it has; 0 if missing
        self.sent: tuple[Tensor, dict[int, Message], int] | None = None

    def send(self, vector: Tensor, round_number: int, cohort: list[int]) -> Sent:
        """Return the vector as the clients decode it, float32 [n], and each client's messages."""
        if round_number == 0:  # before the first change
            return self.shared, {client: [] for client in cohort}
        payload, change = self.channel.encode(vector - self.shared, round_number)
        shared = self.shared.clone()
        change.to(vector.device).add_to(shared)
        newest = self._message(f"{self.kind}_change", payload, len(change.values))
        longest = OVERHEAD + 4 * self.whole.num_coordinates  # bytes of the whole
        changes = _newest(self.changes | {round_number: newest}, longest)
        missed = {c: _missed(changes, self.version_of.get(c, 0), round_number) for c in cohort}
        if not all(missed.values()):
            payload, _ = self.whole.encode(shared, round_number)
            model = self._message(self.kind, payload, self.whole.num_coordinates)
            missed = {client: some or [model] for client, some in missed.items()}
        messages = {
            client: [replace(message, receiver=client) for message in some]
            for client, some in missed.items()
        }
        self.sent = shared, changes, round_number
        return shared, messages

    def commit(self, received: list[int]) -> None:
        self.shared, self.changes, round_number = self.sent
        self.version_of |= dict.fromkeys(received, round_number)
        self.sent = None

    def forget(self, left: Tensor) -> None:
        """The mask has changed; both ends drop the entries at these positions, int64.

        An up-to-date client goes on with the next change. The earlier ones are of no more use.
        """
        self.shared, self.changes = self.shared.index_fill(0, left, 0.0), {}

    def _message(self, kind: str, payload: memoryview, num_values: int) -> Message:
        return self.agreement.message("down", kind, SERVER, SERVER, payload, num_values)

    def state(self) -> dict[str, Any]:
        changes = {
            round_number: asdict(replace(message, payload=None))
            | {"payload": torch.frombuffer(bytearray(message.payload), dtype=torch.uint8)}
            for round_number, message in self.changes.items()
        }
        return {"shared": self.shared, "changes": changes, "version_of": self.version_of}

    def load(self, state: dict[str, Any]) -> None:
        self.shared.copy_(state["shared"])
        self.version_of = state["version_of"]
        self.changes = {
            round_number: Message(**fields | {"payload": fields["payload"].numpy().tobytes()})
            for round_number, fields in state["changes"].items()
        }


class Copies(DownlinkMode):
    """The server keeps a copy of what each client has, and sends what this copy lacks, compressed.

    What compression lost is part of what the copy lacks the next time, so this is error feedback,
    for each client by itself: the downlink of EF21-P (Gruntkowska et al. 2023, arXiv 2209.15218,
    eq. 6) with a shift for each worker. However many rounds a client was away, it receives one
    message. The first copy needs no message: each end has it from the run's seed.

    A client's copy lies with its state, on the rank that trains it, which does this part of the
    server's work. It counts from when the client has answered: a client that was cut off goes on
    from the copy before, and so does the server.
    """

    def __init__(self, agreement: Agreement, vector: Tensor, kind: str = "model"):
        self.agreement, self.kind = agreement, f"{kind}_change"
        self.channel = agreement.channel("down", self.kind)
        self.first = vector.clone()
        self.allowance = Allowance(agreement) if agreement.config.downlink.budget else None
        self.limit = 0.0  # of the round under way, if there is an allowance

    def send(self, vector: Tensor, round_number: int, cohort: list[int]) -> Sent:
        """Return the vector itself, and no message: to_each() makes them one by one."""
        if self.allowance:
            self.limit = self.allowance.limit_of(vector - self._masked(self.first), round_number)
        return vector, {client: [] for client in cohort}

    def to_each(self, vector: Tensor, round_number: int) -> Bring:
        return partial(self._bring, vector, round_number)

    def _bring(
        self, vector: Tensor, round_number: int, client: int, copy: Tensor | None
    ) -> tuple[Tensor, Message]:
        """Return a client's new copy, and the message that makes it of the old one."""
        with within("encode"):
            copy = self._masked((self.first if copy is None else copy).to(vector.device))
            lacks, select = vector - copy, self._select()
            payload, change = self.channel.encode(lacks, round_number, client, select=select)
            new = copy.clone()
            change.to(vector.device).add_to(new)
        ends, num_values = (SERVER, client), len(change.values)
        return new, self.agreement.message("down", self.kind, *ends, payload, num_values)

    def _masked(self, copy: Tensor) -> Tensor:
        """A copy as both ends have it: weights that have left the mask since are 0."""
        pruned = self.agreement.mask.pruned
        return copy if pruned is None else copy.masked_fill(pruned.to(copy.device), 0.0)

    def _select(self) -> Select | None:
        """What travels, if a budget decides; None: what the config says."""
        if not self.allowance:
            return None
        limit = self.limit
        return lambda lacks, _: threshold(lacks, limit)

    def observe(self, reports: list[Report], round_number: int) -> None:
        if self.allowance:
            messages = (message for report in reports for message in report.received)
            spent = sum(message.num_bytes for message in messages if message.kind == self.kind)
            self.allowance.spend(spent, self.limit, round_number)

    def state(self) -> dict[str, Any]:
        return self.allowance.state() if self.allowance else {}

    def load(self, state: dict[str, Any]) -> None:
        if self.allowance:
            self.allowance.load(state)


def _newest(changes: dict[int, Message], limit: int) -> dict[int, Message]:
    """The newest changes that are together no longer than `limit` bytes."""
    kept, total = {}, 0
    for round_number in sorted(changes, reverse=True):
        total += changes[round_number].num_bytes
        if total > limit:
            break
        kept[round_number] = changes[round_number]
    return kept


def _missed(changes: dict[int, Message], version: int, round_number: int) -> list[Message]:
    """The changes from a client's version to this round; none if the whole vector must go."""
    if version + 1 not in changes:
        return []
    *missed, newest = (changes[number] for number in range(version + 1, round_number + 1))
    # In their place a dense system would send one model: the earlier ones stand for nothing.
    return [*(replace(message, dense_values=0) for message in missed), newest]
