"""Synchronous federated training, round by round.

A round samples a cohort, broadcasts the model as a payload, trains each client from what that
payload decodes to, prunes and encodes what the clients learned, decodes and averages the payloads
in client order, lets the server's optimizer step, and evaluates.

The server may begin with more clients than it needs and keep the fastest, or wait until a deadline
(Bonawitz et al. 2019, arXiv 1902.01046). What the others learned is lost, but for what they owe;
carried.py waits for it instead.
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from compression import Decoded
from config import Config, ConfigError
from distributed import Ranks
from federation.federation import Encode, Federation
from federation.ledger import LedgerRow
from federation.messages import Report, pack_reports, unpack_reports
from federation.samplers import SAMPLERS
from federation.server import Average
from training.local_sgd import Interrupted

Arrival = tuple[Report, dict[str, Decoded]]


class Synchronous(Federation):
    """Everything that a run holds in memory, and its rounds."""

    def __init__(self, config: Config, ranks: Ranks, *rest: Any):
        super().__init__(config, ranks, *rest)
        schedule = config.schedule
        waits = schedule.over_selection == 1 and schedule.deadline_seconds is None
        self.waits_for_all = waits and self.clock.all_stay
        self.earlier: list[Report] = []  # of round 0, until they are recorded with round 1
        self.sampler = SAMPLERS[schedule.sampling](config, self.workload.seconds_alone)
        self._check_deadline()

    def run_round(self) -> tuple[dict[str, Any], list[LedgerRow]]:
        begin, round_number = time.perf_counter(), self.progress.round_number + 1
        there = self.clock.who_is_there(self._idle())
        cohort = self.sampler.choose(there, round_number)
        if self.server.mask.awaits_scores:
            self._choose_mask(cohort)
        broadcast = self._broadcast(self.server, round_number, cohort)
        self.clients.receive(broadcast, round_number)
        self._place(cohort)
        trained = self._train(cohort, round_number, broadcast)
        average, rows, more = self._average(cohort, round_number, trained)
        with self.phases("step"):
            averaged = self.server.step(average, round_number)
        self.clients.store.commit()
        late = {report.client for report in average.reports if report.is_late}
        self.server.commit(round_number, [client for client in cohort if client not in late])
        scores = self._evaluate(round_number, cohort)
        on_time = [client for client in averaged if client in cohort]
        lasted = _lasted(rows, self.progress.simulated_seconds, on_time)
        self.sampler.observe(round_number, average.reports, lasted)
        return self._record(round_number, begin, average.reports, averaged, scores, rows, **more)

    def _idle(self) -> np.ndarray:
        """Who may begin, if it is there: int64 clients."""
        return self.candidates

    def _average(
        self, cohort: list[int], round_number: int, trained: Iterator[Encode]
    ) -> tuple[Average, list[LedgerRow], dict[str, Any]]:
        """Let the cohort work, and average what arrives in time. Raises Interrupted.

        Returns the average, the ledger's rows, and columns of rounds.jsonl.
        """
        average, uplink = self.server.new_average(cohort), self.clients.uplink
        try:
            rows, keep = None, not self.waits_for_all
            arrivals = self._arrivals(trained, lambda r: average.decode(r, round_number), keep)
            if keep:
                arrivals, rows = self._on_time(list(arrivals), round_number)
            for report, arrived in arrivals:
                with self.phases("step"):
                    average.add(report, arrived)
                uplink.owe_refused(report, round_number)
        except Interrupted:
            self.clients.store.discard()
            raise
        self.exchange.add_up(average)
        if rows is None:
            rows, _ = self._play(average.reports, round_number)
        return average, rows, {}

    def _choose_mask(self, cohort: list[int]) -> None:
        """Before round 1 its cohort scores the weights: in the ledger this is round 0."""
        broadcast = self._broadcast(self.server, 0, cohort)
        self._place(cohort)
        average = self.server.new_average(cohort)
        scored = self._score(cohort, broadcast)
        for arrival in self._arrivals(scored, lambda report: average.decode(report, 0)):
            average.add(*arrival)
        self.exchange.add_up(average)
        self.server.choose_mask(average)
        self.earlier = average.reports

    # --- on the simulated clock -------------------------------------------------------------------

    def _play(self, reports: list[Report], round_number: int) -> tuple[list[LedgerRow], list[int]]:
        """Let the round pass; return a row for each message, and who was done in time."""
        schedule, wanted, done = self.config.schedule, self.config.clients.per_round, []
        deadline = math.inf
        if schedule.deadline_seconds is not None:
            deadline = self.clock.now + schedule.deadline_seconds
        self._start(reports, round_number, deadline)
        while end := self.clock.advance():
            if end.is_complete:
                done.append(end.client)
            if len(done) == wanted:  # nobody waits for the others
                for client in self.clock.simulation.under_way:
                    self.clock.stop(client)
        return self.clock.take_rows(round_number), done

    def _start(self, reports: list[Report], round_number: int, deadline: float = math.inf) -> None:
        """Send the cohort on its way; reports: with the messages of both directions."""
        earlier, self.earlier = {r.client: r for r in self.earlier}, []
        for report in reports:
            parts = [(round_number, report)]
            if report.client in earlier:
                parts.insert(0, (0, earlier[report.client]))
            timed = [(n, part, self._computing_seconds(part, n)) for n, part in parts]
            self.clock.start(timed, deadline)

    def _on_time(
        self, arrivals: list[Arrival], round_number: int
    ) -> tuple[list[Arrival], list[LedgerRow]]:
        """Those arrivals, in which late clients have sent nothing; and the ledger's rows."""
        rows, done = self._play([report for report, _ in arrivals], round_number)
        for number, (report, _) in enumerate(arrivals):
            if report.client not in done:
                report.is_late, report.failure = True, report.failure or "it was late"
                arrivals[number] = report, {}
        return arrivals, rows

    def _check_deadline(self) -> None:
        """Raises ConfigError if nobody can meet the deadline, even without a byte to send up."""
        deadline = self.config.schedule.deadline_seconds
        if deadline is None:
            return
        candidates, some = self.candidates, self.widths.one_of_each
        sent = self.server.broadcast(1, some)  # all clients of a width receive as much
        sizes = {
            self.widths.share_of(c): sum(m.num_bytes for m in sent.of(c).messages[c]) for c in some
        }
        down = np.array([sizes[share] for share in self.widths.shares[candidates]])
        soonest = self.clock.seconds_alone(candidates, down, self.workload.work[candidates]).min()
        if soonest > deadline:
            raise ConfigError(
                f"schedule.deadline_seconds: {deadline} s are too few for every client; the "
                f"fastest one receives the model and trains within {soonest:.1f} s"
            )

    # --- checkpoints ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        earlier = b"".join(pack_reports(self.earlier)).hex()
        return super().state() | {"earlier": earlier, "sampler": self.sampler.state()}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.earlier = unpack_reports(memoryview(bytes.fromhex(state["earlier"])))
        self.sampler.load(state["sampler"])


def _lasted(rows: list[LedgerRow], begin: float, clients: list[int]) -> dict[int, float]:
    """How long after the round's begin each client's last message had arrived."""
    ends = {row.sender: row.start + row.seconds - begin for row in rows if row.direction == "up"}
    return {client: ends[str(client)] for client in clients}
