"""The ledger: one row for each message, from which all byte counts of a run follow."""

from dataclasses import dataclass

from federation.messages import SERVER, Message, edge_server, height

BYTES_PER_VALUE = 4  # of a system without compression, which sends float32


@dataclass(frozen=True)
class LedgerRow:
    """One message; ledger.csv has a column for each field, in this order and by this name."""

    round: int  # 0 for what is sent before the first round
    direction: str  # up or down
    sender: str  # "server", "edge0" and so on, or the client's number
    receiver: str
    kind: str
    bytes: int  # length of the payload
    dense_bytes: int  # what a system without compression would send in its place
    num_values: int  # how many values the payload carries
    start: float  # seconds on the simulated clock of the run
    seconds: float  # how long the message was on its link


def ledger_row(message: Message, round_number: int, start: float, seconds: float) -> LedgerRow:
    """The one place where a message becomes a row."""
    return LedgerRow(
        round=round_number,
        direction=message.direction,
        sender=_name(message.sender),
        receiver=_name(message.receiver),
        kind=message.kind,
        bytes=message.num_bytes,
        dense_bytes=BYTES_PER_VALUE * message.dense_values,
        num_values=message.num_values,
        start=start,
        seconds=seconds,
    )


def _name(node: int) -> str:
    if height(node) == 1:
        return f"edge{edge_server(node)}"  # which is its own inverse
    return "server" if node == SERVER else str(node)
