"""Hierarchical training: edge servers average their clients, and the cloud averages the edges.

HierFAVG (Liu, Zhang, Song and Letaief 2020, arXiv 1905.06641, Algorithm 1). In a round of the cloud

    each edge server receives the model of the cloud, and edge_rounds times (kappa_2 in the paper)
        sends its model to its clients of the cohort, and averages what they learned;
    then it sends its own change to the cloud, whose optimizer steps by the average of the changes.

Clients send as the config says. An edge server sends its change in fp32, without the zeros: nothing
is lost on that hop, so that with edge_rounds = 1 this is the synchronous schedule.

A client counts its own rounds, which are edge rounds: schedules of its learning rate and warm-ups
of its density go by them. Every edge server trains at its own pace until the cloud needs it.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from config import Config, Pruning, Uplink
from config import Server as ServerSettings
from distributed import Ranks
from federation.agreement import Agreement
from federation.cohort import sample_cohort
from federation.federation import Federation
from federation.ledger import LedgerRow
from federation.messages import SERVER, Broadcast, Message, Report, edge_server
from federation.server import Average
from federation.setup import make_server
from training.local_sgd import Interrupted, local_lr


@dataclass
class EdgeWork:
    """What happened below an edge server in a round of the cloud."""

    receives: Report  # the model of the cloud
    rounds: list[list[Report]]  # of its clients, by edge round
    sends: Report  # its change, with the payloads

    @property
    def reports(self) -> list[Report]:
        """Those of its clients."""
        return [report for reports in self.rounds for report in reports]

    @property
    def averaged(self) -> list[int]:
        """The clients that were averaged, each as often as it was."""
        return [report.client for report in self.reports if not report.failure]

    @property
    def steps(self) -> list[list[Report]]:
        """Who sends at once, one step after the other."""
        return [[self.receives], *self.rounds, [self.sends]]


class Hierarchical(Federation):
    """Everything that a run holds in memory, and its rounds.

    Edge server e has the clients c with c % schedule.edges == e. On the clock it follows them: its
    number there, and in reports of its own, is clients.total + e.
    """

    def __init__(self, config: Config, ranks: Ranks, *rest: Any):
        super().__init__(config, ranks, *rest)
        self.edge_rounds, self.first_edge = config.schedule.edge_rounds, config.clients.total
        averaging = replace(config, server=ServerSettings(weighting=config.server.weighting))
        num_examples = list(map(len, self.shards))
        self.edges = [
            make_server(averaging, self.model, num_examples) for _ in range(config.schedule.edges)
        ]
        lossless = replace(
            config,
            pruning=Pruning(method="threshold", threshold=0.0),
            uplink=Uplink(values="fp32", error_feedback=False),
        )
        self.to_cloud = Agreement(lossless, self.model.layout, self.model.buffer_layout)
        self.clients.config = replace(config, rounds=config.rounds * self.edge_rounds)

    @property
    def num_at_once(self) -> int:
        """The clients below one edge server."""
        return -(-super().num_at_once // len(self.edges))

    def run_round(self) -> tuple[dict[str, Any], list[LedgerRow]]:
        begin, round_number = time.perf_counter(), self.progress.round_number + 1
        cohort = sample_cohort(self.config, self.candidates, round_number)
        below: dict[int, list[int]] = {}  # by edge server, if it has any: its part of the cohort
        for client in cohort:
            below.setdefault(client % len(self.edges), []).append(client)
        edges = [edge_server(edge) for edge in below]
        broadcast = self._broadcast(self.server, round_number, edges)
        try:
            works = {
                edge: self._run_edge(edge, clients, round_number, broadcast)
                for edge, clients in sorted(below.items())
            }
        except Interrupted:
            self.clients.store.discard()
            raise
        with self.phases("step"):
            self._step(list(works.values()), round_number)
        self.clients.store.commit()
        reports = [report for work in works.values() for report in work.reports]
        averaged = sorted({client for work in works.values() for client in work.averaged})
        scores = self._evaluate(round_number, cohort)
        rows = self._play(works, round_number)
        row, rows = self._record(round_number, begin, reports, averaged, scores, rows)
        last, rounds = round_number * self.edge_rounds, self.clients.config.rounds
        return row | {"lr": local_lr(self.config.local, last, rounds)}, rows

    # --- below an edge server ---------------------------------------------------------------------

    def _run_edge(
        self, edge: int, clients: list[int], round_number: int, broadcast: Broadcast
    ) -> EdgeWork:
        """Train below an edge server: it receives, averages edge_rounds times, and sends."""
        server = self.edges[edge]
        server.parameters.data.copy_(broadcast.parameters)
        server.buffers = broadcast.buffers
        self._place(clients)
        first = (round_number - 1) * self.edge_rounds + 1
        edge_rounds = range(first, first + self.edge_rounds)
        rounds = [self._average(edge, clients, number).reports for number in edge_rounds]
        node, messages = self.first_edge + edge, broadcast.messages[edge_server(edge)]
        work = EdgeWork(Report(node, 0, received=messages), rounds, Report(node, 0))
        if work.averaged:
            with self.phases("encode"):
                work.sends.messages = self._change(edge, round_number, broadcast)
        else:
            work.sends.fail("no update of its clients could be used")
        return work

    def _average(self, edge: int, clients: list[int], edge_round: int) -> Average:
        """One round of an edge server. Raises Interrupted."""
        server, uplink = self.edges[edge], self.clients.uplink
        broadcast = self._broadcast(server, edge_round, clients)
        average = server.new_average(clients)
        trained = self._train(clients, edge_round, broadcast)
        decode = partial(average.decode, round_number=edge_round)
        for report, arrived in self._arrivals(trained, decode):
            report.received = [_by_way_of(edge, message) for message in report.received]
            report.messages = [_by_way_of(edge, message) for message in report.messages]
            with self.phases("step"):
                average.add(report, arrived)
            uplink.owe_refused(report, edge_round)
        self.exchange.add_up(average)
        with self.phases("step"):
            server.step(average, edge_round)
        self.clients.store.advance()
        return average

    # --- between the edge servers and the cloud ---------------------------------------------------

    def _change(self, edge: int, round_number: int, broadcast: Broadcast) -> list[Message]:
        """What an edge server sends to the cloud: how it has changed since the broadcast."""
        server, agreement, messages = self.edges[edge], self.to_cloud, []
        vectors = {"update": server.parameters.detach() - broadcast.parameters}
        if agreement.sends_buffers:
            vectors["buffers"] = server.buffers
        for kind, vector in vectors.items():
            payload, sent = agreement.channel("up", kind).encode(vector, round_number)
            ends, num_values = (edge_server(edge), SERVER), len(sent.values)
            messages.append(agreement.message("up", kind, *ends, payload, num_values))
        return messages

    def _step(self, works: list[EdgeWork], round_number: int) -> None:
        """Average the edge servers by the weights of the clients that they averaged, and step."""
        server = self.server
        weights = {
            work.sends.client: sum(server.weights[client] for client in work.averaged)
            for work in works
        }
        marks = server.is_counter, server.is_variance
        average = Average(self.to_cloud, weights, *marks, with_norms=False)
        for work in works:
            with self.phases("decode"):
                arrived = average.decode(work.sends, round_number)
            average.add(work.sends, arrived)
        server.step(average, round_number)

    # --- on the simulated clock -------------------------------------------------------------------

    def _play(self, works: dict[int, EdgeWork], round_number: int) -> list[LedgerRow]:
        """Let the round pass, in which each edge server goes through its steps."""
        rows: list[LedgerRow] = []
        left: dict[int, int] = {}  # by edge server: how many are not done with its present step
        waiting = {edge: iter(work.steps) for edge, work in works.items()}

        def begin(edge: int) -> None:
            reports = next(waiting[edge], [])
            left[edge] = len(reports)
            for report in reports:
                self.clock.start([(round_number, report, self._seconds(report, round_number))])

        for edge in works:
            begin(edge)
        while end := self.clock.advance():
            edge = self._edge_of(end.client)
            left[edge] -= 1
            if not left[edge]:
                rows += self.clock.take_rows(round_number)
                begin(edge)
        return rows

    def _edge_of(self, node: int) -> int:
        """The edge server that has this number on the clock, or whose client it is."""
        return node - self.first_edge if node >= self.first_edge else node % len(self.edges)

    def _seconds(self, report: Report, round_number: int) -> float:
        """How long a client computes; an edge server's averaging takes no time."""
        is_client = report.client < self.first_edge
        return self._computing_seconds(report, round_number) if is_client else 0.0


def _by_way_of(edge: int, message: Message) -> Message:
    """A message between a server and a client, where the server is this edge server."""
    ends = (edge_server(edge) if n == SERVER else n for n in (message.sender, message.receiver))
    sender, receiver = ends
    return replace(message, sender=sender, receiver=receiver)
