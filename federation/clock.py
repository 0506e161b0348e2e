"""The simulated clock of a run: when which message was on its client's link.

It turns what clients report into chains of stages for network/simulation.py, and what that makes of
them into rows of the ledger.
"""

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from config import ConfigError
from federation.ledger import LedgerRow, ledger_row
from federation.messages import Message, Report
from network.availability import Availability, dropouts
from network.population import Population
from network.simulation import End, Simulation, Span, Stage

Part = tuple[int, Report, float]  # round, what was sent in it, seconds of computing


class Clock:
    """population: every client's link and device; simulation: of these clients.

    availability: when each client is there; dropout: the probability that one drops out of a round.
    """

    def __init__(
        self,
        population: Population,
        simulation: Simulation,
        availability: Availability,
        dropout: float,
    ):
        self.population, self.simulation = population, simulation
        self.availability, self.dropout = availability, dropout
        # By client and place in its chain: the round and the message.
        self.messages: dict[int, list[tuple[int, Message] | None]] = {}

    @property
    def now(self) -> float:
        """Simulated seconds since the run began."""
        return self.simulation.now

    def computing_seconds(
        self, clients: np.ndarray | int, num_examples: np.ndarray | float
    ) -> np.ndarray:
        """How long each client's device trains on so many examples of the whole network."""
        return num_examples * self.population.ms_per_example[clients] / 1e3

    @property
    def all_stay(self) -> bool:
        """Whether nobody ever leaves before it is done."""
        return type(self.availability) is Availability and not self.dropout

    def who_is_there(self, clients: np.ndarray) -> np.ndarray:
        """Those of the clients that are there now, int64.

        If none is, and nobody is under way, time passes until one comes. Raises ConfigError if
        none ever does.
        """
        coming = self.availability.comes(clients, self.now)
        if not self.simulation.under_way:
            first = float(coming.min(initial=math.inf))
            if math.isinf(first):
                raise ConfigError("network.availability: no client ever comes again; lower rounds")
            self.simulation.advance(until=max(first, self.now))
        return clients[coming <= self.now]

    def start(self, parts: list[Part], deadline: float = math.inf) -> None:
        """A client starts now: in each part it receives, computes, and sends.

        It stops at the deadline, a simulated time, and when it leaves or drops out.
        """
        stages, messages = [], []
        for round_number, report, seconds in parts:
            computes = Stage("compute", seconds=seconds)
            downs, ups = report.received, report.messages
            stages += [*map(_stage, downs), computes, *map(_stage, ups)]
            noted = [(round_number, replace(m, payload=None)) for m in (*downs, *ups)]
            messages += [*noted[: len(downs)], None, *noted[len(downs) :]]
        client = parts[-1][1].client
        self.messages[client] = messages
        stops = float(min(deadline, self._leaves(client, parts[-1][0], stages)))
        self.simulation.start(client, stages, stop_at=stops)

    def _leaves(self, client: int, round_number: int, stages: list[Stage]) -> float:
        """When the client would leave, whether it is done or not; inf if it stays."""
        who = np.array([client])
        leaves = float(self.availability.leaves(who, self.now)[0])
        share = float(dropouts(self.dropout, self.simulation.seed, round_number, who)[0])
        if math.isinf(share):
            return leaves
        alone = float(self.simulation.seconds_alone(client, stages))
        return min(leaves, self.now + share * alone)

    def advance(self, until: float = math.inf) -> End | None:
        """Let time pass until a client is done; None if nobody is by then, or is under way."""
        return self.simulation.advance(until)

    def advance_together(self) -> list[End]:
        """Let time pass until a client is done; all that are done at that moment, by client."""
        ends = [self.simulation.advance()]
        while end := self.simulation.advance(until=self.now):
            ends.append(end)
        return sorted(filter(None, ends), key=lambda end: end.client)

    def stop(self, client: int) -> None:
        """Nobody waits for this client any more: what it sends is cut off."""
        self.simulation.stop(client)

    def take_rows(self, round_number: int) -> list[LedgerRow]:
        """A row for each message that was sent since the last call, by client.

        It belongs to the round in which it was over, or to round 0 if it was sent before the first.
        A message that was cut off carries nothing, and counts with the bytes that had arrived.
        """
        rows = []
        for span in sorted(self.simulation.spans, key=lambda span: (span.client, span.start)):
            entry = self.messages[span.client][span.stage]
            if entry is None:
                continue
            began, message = entry
            if span.num_bytes < message.num_bytes:
                message = replace(message, num_bytes=span.num_bytes, num_values=0, dense_values=0)
            number = round_number if began else 0
            rows.append(ledger_row(message, number, span.start, span.end - span.start))
        self.simulation.spans.clear()
        return rows

    def seconds_alone(
        self,
        clients: np.ndarray | int,
        down: np.ndarray | int,
        num_examples: np.ndarray | float,
        up: np.ndarray | int = 0,
    ) -> np.ndarray:
        """How long each client takes to receive so many bytes, train, and send, if it is alone."""
        computes = Stage("compute", seconds=self.computing_seconds(clients, num_examples))
        stages = [Stage("down", down), computes, Stage("up", up)]
        return self.simulation.seconds_alone(clients, stages if np.any(up) else stages[:2])

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain values."""
        messages = {
            client: [entry and (entry[0], asdict(entry[1])) for entry in self.messages[client]]
            for client in self.simulation.under_way
        }
        spans = [tuple(span) for span in self.simulation.spans]
        return {"simulation": self.simulation.state(), "spans": spans, "messages": messages}

    def load(self, state: dict[str, Any]) -> None:
        self.simulation.load(state["simulation"])
        self.simulation.spans = [Span(*span) for span in state["spans"]]
        self.messages = {
            client: [entry and (entry[0], Message(**entry[1])) for entry in entries]
            for client, entries in state["messages"].items()
        }


def _stage(message: Message) -> Stage:
    return Stage(message.direction, message.num_bytes)
