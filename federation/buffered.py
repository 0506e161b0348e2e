"""Asynchronous federated training: clients come and go, and the server waits for no one of them.

FedBuff (Nguyen et al. 2022, arXiv 2106.06639, Algorithm 1) keeps a number of clients under way.
Whoever is done hands in its update and makes room for another client, which begins with the model
of that moment. Once K updates are in the buffer, the server steps by

    (1 / K) * sum of (1 + s_i)^-a * Delta_i

where s_i counts the steps that the server has taken since client i began. A round is one step.

FedAsync (Xie et al. 2019, arXiv 1903.03934, Algorithm 1) steps with each client:

    x <- (1 - alpha_s) * x + alpha_s * x_i,    alpha_s = alpha * (1 + s)^-a
"""

import time
from typing import Any

import numpy as np
from torch import Tensor

from config import Config
from distributed import Ranks
from federation.cohort import sample
from federation.federation import Federation
from federation.flights import Flight, packed, unpacked, with_own_payloads
from federation.ledger import LedgerRow
from federation.messages import Report
from federation.server import Average
from training.local_sgd import Interrupted


class FedBuff(Federation):
    """Everything that a run holds in memory, and its rounds."""

    def __init__(self, config: Config, ranks: Ranks, *rest: Any):
        super().__init__(config, ranks, *rest)
        self.concurrency = config.schedule.concurrency or config.clients.per_round
        self.buffer_size = config.schedule.buffer
        self.flights: dict[int, Flight] = {}  # by client, those under way
        self.buffer: list[Flight] = []  # in the order in which they were done

    @property
    def num_at_once(self) -> int:
        """Clients that take equally long begin together, and others one by one."""
        are_alike = np.ptp(self.workload.seconds_alone(self.candidates)) == 0
        return -(-self.concurrency // self.ranks.num_teams) if are_alike else 1

    def run_round(self) -> tuple[dict[str, Any], list[LedgerRow]]:
        begin, round_number = time.perf_counter(), self.progress.round_number + 1
        before = self.clock.state(), dict(self.flights), list(self.buffer)
        try:
            started, lost = self._fill_buffer(round_number)
        except Interrupted:
            self.clients.store.discard()
            clock, self.flights, self.buffer = before
            self.clock.load(clock)
            raise
        used, self.buffer = self.buffer[: self.buffer_size], self.buffer[self.buffer_size :]
        with self.phases("step"):
            average = self._average(sorted(used, key=lambda f: f.report.client), round_number)
            averaged = self.server.step(average, round_number)
        self.clients.store.commit()
        self.server.commit(round_number, started)
        scores = self._evaluate(round_number, averaged)
        staleness = sum(flight.staleness(round_number) for flight in used) / max(1, len(used))
        reports, rows = [*average.reports, *lost], self.clock.take_rows(round_number)
        more = {"staleness": staleness}
        return self._record(round_number, begin, reports, averaged, scores, rows, **more)

    def _fill_buffer(self, round_number: int) -> tuple[list[int], list[Report]]:
        """Let time pass until K updates are there; return who began, and who did not arrive.

        It also ends once as many clients have failed as can be under way. Raises Interrupted.
        """
        started: list[int] = []
        lost: list[Report] = []
        while len(self.buffer) < self.buffer_size and len(lost) <= self.concurrency:
            free = self.concurrency - len(self.flights)
            idle = self._idle(started) if free else []
            if not self.flights and not len(idle):
                break  # everybody has taken part in this round
            if len(idle):
                there = self.clock.who_is_there(idle)
                seed = self.config.seed_for("cohort", round_number, len(started))
                wave = sample(there, free, seed)
                self._start(wave, round_number)
                started += wave
            for end in self.clock.advance_together():
                flight = self.flights.pop(end.client)
                if not end.is_complete:
                    holds_state = self.placement.holds_state(end.client)
                    flight.lose(self.clients.uplink if holds_state else None, round_number)
                if flight.report.failure:
                    lost.append(flight.report)
                else:
                    self.buffer.append(flight)
        return started, lost

    def _idle(self, started: list[int]) -> np.ndarray:
        """Who may begin: clients that neither began in this round nor are under way or waiting."""
        waiting = [flight.report.client for flight in self.buffer]
        return self.candidates[~np.isin(self.candidates, [*started, *self.flights, *waiting])]

    def _start(self, wave: list[int], round_number: int) -> None:
        """Train these clients from the present model, and send them on their way."""
        if not wave:
            return
        broadcast = self._broadcast(self.server, round_number, wave)
        self.clients.receive(broadcast, round_number)
        self._place(wave)
        trained = self._train(wave, round_number, broadcast)
        for report, messages in self._arrivals(trained, with_own_payloads):
            report.messages = messages
            computing = self._computing_seconds(report, round_number)
            self.clock.start([(round_number, report, computing)])
            self.flights[report.client] = Flight(report, round_number)

    def _average(self, used: list[Flight], round_number: int) -> Average:
        """What the buffer holds, each update discounted by its staleness."""
        average = self.server.new_average([flight.report.client for flight in used])
        for flight in used:
            with self.phases("decode"):
                arrived = average.decode(flight.report, flight.round_number)
            average.add(flight.report, arrived, self._discount(flight, round_number))
        return average

    def _discount(self, flight: Flight, round_number: int) -> float:
        return flight.discount(round_number, self.config.schedule.staleness_power)

    # --- checkpoints ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "flights": packed(list(self.flights.values())),
            "buffer": packed(self.buffer),
        }

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.flights = {f.report.client: f for f in unpacked(state["flights"])}
        self.buffer = unpacked(state["buffer"])


class FedAsync(FedBuff):
    """Everything that a run holds in memory, and its rounds."""

    def __init__(self, config: Config, ranks: Ranks, *rest: Any):
        super().__init__(config, ranks, *rest)
        self.buffer_size = 1
        self.models: dict[int, Tensor] = {}  # by round: the weights that its clients began with

    def _start(self, wave: list[int], round_number: int) -> None:
        self.models[round_number] = self.server.parameters.detach().clone()
        super()._start(wave, round_number)

    def _average(self, used: list[Flight], round_number: int) -> Average:
        average = super()._average(used, round_number)
        for flight in used if average.averaged else ():
            share = self._discount(flight, round_number)
            moved = self.models[flight.round_number] - self.server.parameters.detach()
            average.sums["update"].add_(moved, alpha=share)
            if "buffers" in average.sums:
                average.sums["buffers"].lerp_(self.server.buffers, 1 - share)
        begun = {flight.round_number for flight in (*self.flights.values(), *self.buffer)}
        self.models = {number: self.models[number] for number in begun}
        return average

    def _discount(self, flight: Flight, round_number: int) -> float:
        return self.config.schedule.mixing * super()._discount(flight, round_number)

    def state(self) -> dict[str, Any]:
        return super().state() | {"models": self.models}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        device = self.server.device
        self.models = {number: model.to(device) for number, model in state["models"].items()}
