"""Synchronous rounds with a deadline whose late updates are carried over, not dropped.

An update that misses the deadline of its round goes on its way while the next rounds run. It counts
in the round in whose time it arrives, s rounds after its own, and there by (1 + s)^-a of what it
would have, as in FedBuff (Nguyen et al. 2022, arXiv 2106.06639). Until then its client is busy and
is not sampled.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from config import Config
from distributed import Ranks
from federation.federation import Encode
from federation.flights import Flight, packed, unpacked, with_own_payloads
from federation.ledger import LedgerRow
from federation.server import Average
from federation.synchronous import Arrival, Synchronous
from training.local_sgd import Interrupted


class CarriedOver(Synchronous):
    """Everything that a run holds in memory, and its rounds."""

    def __init__(self, config: Config, ranks: Ranks, *rest: Any):
        super().__init__(config, ranks, *rest)
        self.flights: dict[int, Flight] = {}  # by client: those of earlier rounds, under way

    def _idle(self) -> np.ndarray:
        return self.candidates[~np.isin(self.candidates, list(self.flights))]

    def _average(
        self, cohort: list[int], round_number: int, trained: Iterator[Encode]
    ) -> tuple[Average, list[LedgerRow], dict[str, Any]]:
        """Let the cohort work, and average what arrives in time. Raises Interrupted."""
        average = self.server.new_average(sorted([*cohort, *self.flights]))
        try:
            arrivals = self._arrivals(trained, lambda r: average.decode(r, round_number), keep=True)
            fresh = {report.client: (report, arrived) for report, arrived in arrivals}
        except Interrupted:
            self.clients.store.discard()
            raise
        self._start([report for report, _ in fresh.values()], round_number)
        is_complete = self._wait(cohort)
        flights = {
            client: self.flights.pop(client) for client in is_complete if client not in fresh
        }
        with self.phases("step"):
            for client in sorted(fresh | flights):
                if client in fresh:
                    self._add_fresh(average, fresh[client], is_complete, round_number)
                else:
                    self._add_late(average, flights[client], is_complete[client], round_number)
        used = [flight for flight in flights.values() if not flight.report.failure]
        more = {
            "num_carried": len(used),  # updates of earlier rounds that count in this one
            "staleness": sum(f.staleness(round_number) for f in used) / max(1, len(used)),
        }
        return average, self.clock.take_rows(round_number), more

    def _wait(self, cohort: list[int]) -> dict[int, bool]:
        """Let time pass until the cohort is done, or as many of it as count, or the deadline.

        Returns whether each client whose way has ended was done; the others have left. If nobody
        could begin, the round lasts until the deadline.
        """
        deadline = self.clock.now + self.config.schedule.deadline_seconds
        is_complete: dict[int, bool] = {}
        while end := self.clock.advance(until=deadline):
            is_complete[end.client] = end.is_complete
            ended = [is_complete[client] for client in cohort if client in is_complete]
            if cohort and (
                len(ended) == len(cohort) or sum(ended) == self.config.clients.per_round
            ):
                break
        return is_complete

    def _add_fresh(
        self, average: Average, arrival: Arrival, is_complete: dict[int, bool], round_number: int
    ) -> None:
        """Add an update of this round, unless it is still under way: then it is a flight."""
        report, arrived = arrival
        is_done = is_complete.get(report.client)
        if is_done is False:
            report.is_late, report.failure = True, report.failure or "it left before it was done"
        if is_done is None:
            flying = replace(report, messages=with_own_payloads(report))
            self.flights[report.client] = Flight(flying, round_number)
        else:
            average.add(report, arrived if is_done else {})
        self.clients.uplink.owe_refused(report, round_number)

    def _add_late(self, average: Average, flight: Flight, is_done: bool, round_number: int) -> None:
        """Add an update of an earlier round, unless its client has left on the way."""
        report, arrived = flight.report, {}
        if is_done:
            with self.phases("decode"):
                arrived = average.decode(report, flight.round_number)
        else:
            holds_state = self.placement.holds_state(report.client)
            flight.lose(self.clients.uplink if holds_state else None, round_number)
        power = self.config.schedule.staleness_power
        average.add(report, arrived, flight.discount(round_number, power))

    # --- checkpoints ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return super().state() | {"flights": packed(list(self.flights.values()))}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.flights = {flight.report.client: flight for flight in unpacked(state["flights"])}
