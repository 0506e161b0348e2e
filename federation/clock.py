"""The simulated clock of a run: when which message was on its client's link.

It turns what clients report into chains of stages for network/simulation.py, and what that makes of
them into rows of the ledger.
"""

from dataclasses import replace
from typing import Any

from federation.ledger import LedgerRow, ledger_row
from federation.messages import Message, Report
from network.population import Population
from network.simulation import End, Simulation, Stage

Part = tuple[int, Report, float]  # round, what was sent in it, seconds of computing


class Clock:
    """population: every client's link and device; simulation: of these clients."""

    def __init__(self, population: Population, simulation: Simulation):
        self.population, self.simulation = population, simulation
        # By client and place in its chain: the round and the message.
        self.messages: dict[int, list[tuple[int, Message] | None]] = {}

    @property
    def now(self) -> float:
        """Simulated seconds since the run began."""
        return self.simulation.now

    def computing_seconds(self, client: int, num_examples: int) -> float:
        """How long a client's device trains on so many examples."""
        return num_examples * float(self.population.ms_per_example[client]) / 1e3

    def start(self, parts: list[Part], **when: float) -> None:
        """A client starts now: in each part it receives, computes, and sends.

        when: as in Simulation.start().
        """
        stages, messages = [], []
        for round_number, report, seconds in parts:
            computes = Stage("compute", seconds=seconds)
            downs = [m for m in report.messages if m.direction == "down"]
            ups = [m for m in report.messages if m.direction == "up"]
            stages += [*map(_stage, downs), computes, *map(_stage, ups)]
            messages += [(round_number, m) for m in downs] + [None]
            messages += [(round_number, m) for m in ups]
        client = parts[-1][1].client
        self.messages[client] = messages
        self.simulation.start(client, stages, **when)

    def advance(self, **until: float) -> End | None:
        """Let time pass until a client is done; None if nobody is under way any more."""
        return self.simulation.advance(**until)

    def stop(self, client: int) -> None:
        """Nobody waits for this client any more: what it sends is cut off."""
        self.simulation.stop(client)

    def take_rows(self) -> list[LedgerRow]:
        """A row for each message that was sent since the last call, by client.

        A message that was cut off carries nothing, and counts with the bytes that had arrived.
        """
        rows = []
        for span in sorted(self.simulation.spans, key=lambda span: (span.client, span.start)):
            entry = self.messages[span.client][span.stage]
            if entry is None:
                continue
            round_number, message = entry
            if span.num_bytes < message.num_bytes:
                message = replace(
                    message, num_bytes=span.num_bytes, num_values=0, dense_values=0
                )
            rows.append(ledger_row(message, round_number, span.start, span.end - span.start))
        self.simulation.spans.clear()
        return rows

    def state(self) -> dict[str, Any]:
        """For a checkpoint in which nobody is under way: plain values."""
        return self.simulation.state()

    def load(self, state: dict[str, Any]) -> None:
        self.simulation.load(state)


def _stage(message: Message) -> Stage:
    return Stage(message.direction, message.num_bytes)
