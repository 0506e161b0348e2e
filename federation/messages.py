"""What travels between the server and the clients, and how it gets from rank to rank."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from torch import Tensor

Buffer = bytes | memoryview
SERVER = -1  # stands for the server as a sender or a receiver; clients are counted from 0


def edge_server(number: int) -> int:
    """What stands for an edge server, which is between clients and the server: -2, -3, ..."""
    return SERVER - 1 - number


def height(node: int) -> int:
    """How far above the clients a sender or a receiver is."""
    return 0 if node >= 0 else 2 if node == SERVER else 1


@dataclass(frozen=True)
class Message:
    """A payload on its way, in either direction."""

    kind: str  # such as update, model or buffers: see the table in agreement.py
    sender: int  # a client, SERVER, or an edge_server()
    receiver: int
    payload: Buffer | None  # None where the payload stayed on the rank that made it
    num_bytes: int  # length of the payload
    num_values: int  # how many values the payload carries
    dense_values: int  # how many float32 values a system without compression would send

    @property
    def direction(self) -> str:
        """up: towards the server, or to a neighbour; down: away from the server."""
        return "up" if height(self.receiver) >= height(self.sender) else "down"


@dataclass
class Report:
    """What one client returns in a round: how its training went, and its messages."""

    client: int
    num_examples: int
    loss: float = 0.0  # mean over the batches
    step_length: float = 0.0  # see algorithms.py
    num_skipped_steps: int = 0  # steps that fp16 left out because a gradient overflowed
    failure: str = ""  # why the client is left out of the average; empty if it is not
    is_late: bool = False  # whether it is left out because the server did not wait for it
    received: list[Message] = field(default_factory=list)  # what brought the model; no payloads
    messages: list[Message] = field(default_factory=list)  # what it sends
    residual_norm: float | None = None  # L2, of what the client owes now; None: it never owes
    # Of its update, see compressors/composition.py; only some clients say so, see LocalUpdate.
    bytes_by_part: dict[str, int] = field(default_factory=dict)
    bytes_by_tensor: dict[str, int] = field(default_factory=dict)

    def fail(self, reason: str) -> None:
        """Send nothing, and say why."""
        self.failure, self.messages = reason, []

    def without_payloads(self) -> "Report":
        """The same report, whose payloads stay where they are."""
        return replace(self, messages=without_payloads(self.messages))


@dataclass(frozen=True)
class Broadcast:
    """What the clients decode, float32 [n] each, and the messages that it came in."""

    parameters: Tensor
    vector: Tensor | None  # the algorithm's; None if none travels
    buffers: Tensor
    mask_version: int  # that the clients have once they received their messages
    messages: dict[int, list[Message]]  # by client
    # (a client, the model that it had or None) -> (the model that it has now, the message).
    bring: Callable[[int, Tensor | None], tuple[Tensor, Message]] | None = None

    def of(self, client: int, copy: Tensor | None = None) -> "Broadcast":
        """What this client begins with: the same as all others, or its own copy of the model.

        copy: float32 [n], the copy that it had before; None if it has never had one.
        """
        if self.bring is None:
            return self
        parameters, message = self.bring(client, copy)
        messages = {client: [*self.messages[client], message]}
        return replace(self, parameters=parameters, messages=messages, bring=None)


def without_payloads(messages: list[Message]) -> list[Message]:
    """The same messages, whose payloads stay where they are."""
    return [replace(message, payload=None) for message in messages]


def pack_reports(reports: list[Report]) -> list[Buffer]:
    """The length of a head, the head, which is JSON, and then all payloads."""
    payloads = [m.payload for r in reports for m in r.messages if m.payload is not None]
    heads = [_head(report) for report in reports]
    head = json.dumps(heads).encode()
    return [len(head).to_bytes(8, "little"), head, *payloads]


def unpack_reports(blob: memoryview) -> list[Report]:
    """The reports that pack_reports() packed; their payloads are views into the blob."""
    position = 8 + int.from_bytes(blob[:8], "little")
    reports = []
    for head in json.loads(bytes(blob[8:position])):
        received = [Message(**fields) for fields in head.pop("received")]
        messages = []
        for fields in head.pop("messages"):
            payload = None
            if fields.pop("travels"):
                payload = blob[position : position + fields["num_bytes"]]
                position += fields["num_bytes"]
            messages.append(Message(**fields, payload=payload))
        reports.append(Report(**head, received=received, messages=messages))
    return reports


def _head(report: Report) -> dict:
    """A report as JSON can hold it: without its payloads."""
    head = asdict(report.without_payloads())
    for message, fields in zip(report.messages, head["messages"], strict=True):
        fields["travels"] = message.payload is not None
        del fields["payload"]
    return head
