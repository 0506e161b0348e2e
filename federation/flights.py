"""Updates that are on their way while the server goes on: what FedBuff and late updates have.

A client under way has been trained and encoded already, since only the length of its payload tells
when it arrives.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from federation.messages import Message, Report, pack_reports, unpack_reports
from federation.uplink import Uplink


@dataclass
class Flight:
    """A client under way, or arrived and not yet averaged."""

    report: Report  # with its payloads
    round_number: int  # in which it began

    def staleness(self, round_number: int) -> int:
        """How many steps the server has taken since."""
        return round_number - self.round_number

    def discount(self, round_number: int, power: float) -> float:
        """(1 + s)^-a, with which an update counts (Nguyen et al. 2022, arXiv 2106.06639)."""
        return (1 + self.staleness(round_number)) ** -power

    def lose(self, uplink: Uplink | None, round_number: int) -> None:
        """The client has left before it was done: what it would have sent is owed again.

        uplink: of the client's rank, where its state is; None elsewhere.
        """
        report = self.report
        [sent] = [m.payload for m in report.messages if m.kind == "update"] or [None]
        if uplink is not None and sent is not None and not report.failure:
            uplink.owe_lost(report.client, sent, self.round_number, round_number)
        report.is_late, report.failure = True, report.failure or "it left before it was done"


def with_own_payloads(report: Report) -> list[Message]:
    """The report's messages with payloads that outlive the memory that they were written on."""
    return [replace(message, payload=bytes(message.payload)) for message in report.messages]


def packed(flights: list[Flight]) -> dict[str, Any]:
    """For a checkpoint: tensors and plain values."""
    blob = b"".join(pack_reports([flight.report for flight in flights]))
    return {
        "rounds": [flight.round_number for flight in flights],
        "reports": torch.frombuffer(bytearray(blob), dtype=torch.uint8),
    }


def unpacked(state: dict[str, Any]) -> list[Flight]:
    """The flights that packed() packed."""
    reports = unpack_reports(memoryview(state["reports"].numpy().tobytes()))
    return [Flight(*pair) for pair in zip(reports, state["rounds"], strict=True)]
