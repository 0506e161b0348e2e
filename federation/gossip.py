"""Gossip: every node has a model of its own and exchanges it with its neighbours; no server.

In a round node i trains, which takes its model to x_i, and sends q_i to its neighbours. Then

    z_i <- z_i + sum over j of w_ij * q_j - q_i
    x_i <- x_i + gamma * z_i

where j runs over its neighbours and itself, with Metropolis weights w (network/graph.py), so that
the mean of all models stays as it is.

D-PSGD (Lian et al. 2017, arXiv 1705.09056, Algorithm 1): q_i is x_i itself, z_i is forgotten after
each round, gamma = 1. Where nothing is lost this is x_i <- sum over j of w_ij * x_j.

CHOCO-SGD (Koloskova, Stich and Jaggi 2019, arXiv 1902.00340, Algorithm 2, in its form for little
memory): q_i is the compressed difference between x_i and what the neighbours know of it,

    q_i = Q(x_i - e_i),  e_i <- e_i + q_i    (x_hat_i in the paper)

so that z_i is the sum over j of w_ij * e_j - e_i, and what compression loses is part of a later
q_i. All nodes begin with the same model, which is e_i at first.

What is scored, saved and hashed as the model of the run is the average of all nodes' models.
"""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compression import Decoded, Memory, PayloadError, all_finite
from config import Config, from_here
from distributed import Ranks
from federation.agreement import Agreement
from federation.client_store import ClientStore, State
from federation.federation import Federation
from federation.ledger import LedgerRow
from federation.messages import SERVER, Broadcast, Report
from federation.server import Server
from federation.uplink import LocalUpdate
from network.graph import make_graph, metropolis
from training.evaluation import evaluate
from training.local_sgd import Interrupted

# Models are added up as whole multiples of this, so that no order of adding changes a bit.
UNIT = 2.0**-32
REFUSED = "payload refused"


class OwnModels:
    """What the nodes begin a round with, in place of a broadcast: each its own model."""

    def __init__(self, server: Server, store: ClientStore):
        self.server, self.store = server, store

    def of(self, node: int, copy: Tensor | None = None) -> Broadcast:
        """The node's model, on the device of training."""
        server = self.server
        state = self.store.get(node) or self.first()
        parameters, buffers = (state[key].to(server.device) for key in ("model", "buffers"))
        return Broadcast(parameters, None, buffers, server.mask.version, {})

    def first(self) -> State:
        """What all nodes begin the run with, and know of each other."""
        model = self.server.parameters.detach().clone()
        return State(model=model, buffers=self.server.buffers, estimate=model)


class Gossip(Federation):
    """Everything that a run holds in memory, and its rounds.

    weights: by node, those of its neighbours and its own. The nodes' models are states of clients
    in the ClientStore. server: holds the first model, and after each round the average of all.
    """

    def __init__(self, config: Config, ranks: Ranks, *rest: Any):
        super().__init__(config, ranks, *rest)
        schedule = config.schedule
        self.is_choco = schedule.gossip == "CHOCO-SGD"
        self.gamma = schedule.gamma if self.is_choco else 1.0
        graph = make_graph(schedule, config.clients.total, config.seed, from_here)
        self.weights = metropolis(graph)
        # What CHOCO-SGD loses is owed, too, so that a coder must contract: see Channel.
        agreed = replace(config, uplink=replace(config.uplink, error_feedback=self.is_choco))
        self.agreement = Agreement(agreed, self.model.layout, self.model.buffer_layout)
        self.models = OwnModels(self.server, self.clients.store)

    def run_round(self) -> tuple[dict[str, Any], list[LedgerRow]]:
        begin, round_number = time.perf_counter(), self.progress.round_number + 1
        nodes = self.candidates.tolist()
        self._place(nodes)
        check = partial(self._check, round_number=round_number)
        try:
            trained = self._train(nodes, round_number, self.models)
            reports = [report for report, _ in self._arrivals(trained, check, keep=True)]
        except Interrupted:
            self.clients.store.discard()
            raise
        with self.phases("step"):
            self._exchange(reports, round_number)
        self.clients.store.commit()
        scores = self._evaluate(round_number, nodes)
        averaged = [report.client for report in reports if not report.failure]
        rows = self._play(reports, round_number)
        return self._record(round_number, begin, reports, averaged, scores, rows)

    # --- what a node sends ------------------------------------------------------------------------

    def _encode(self, trained: LocalUpdate, round_number: int, memory: Memory) -> Report:
        """Encode what a node sends, and stage its model: the one that it had if training failed."""
        report, before = trained.report, self.models.of(trained.report.client)
        model, buffers = before.parameters, before.buffers
        learned = [part for part in (trained.update, trained.buffers) if part is not None]
        if not learned or not all(map(all_finite, learned)):
            report.failure = report.failure or "the update is not finite"
        else:
            report.loss, model = float(trained.loss), model + trained.update
            buffers = buffers if trained.buffers is None else trained.buffers
        state = trained.state or self.models.first()
        sent = model - state["estimate"].to(model.device) if self.is_choco else model
        self._add(report, "update", sent, round_number, memory)
        if trained.is_described:
            self.agreement.channel("up", "update").describe(report, round_number)
        if self.agreement.sends_buffers:
            self._add(report, "buffers", buffers, round_number, memory)
        state = state | State(model=model, buffers=buffers)
        self.clients.store.stage(report.client, state, round_number)
        return report

    def _add(
        self, report: Report, kind: str, vector: Tensor, round_number: int, memory: Memory
    ) -> None:
        """Encode a vector into a message, of which _play() makes one to each neighbour."""
        channel, ends = self.agreement.channel("up", kind), (report.client, SERVER)
        payload, sent = channel.encode(vector, round_number, report.client, memory)
        message = self.agreement.message("up", kind, *ends, payload, len(sent.values))
        report.messages.append(message)

    # --- what it makes of its neighbours' messages ------------------------------------------------

    def _check(self, report: Report, round_number: int) -> None:
        """Note in the report whether its payloads decode."""
        try:
            self._decode(report, round_number)
        except PayloadError as error:
            report.failure = f"{REFUSED}: {error}"

    def _decode(self, report: Report, round_number: int) -> dict[str, Decoded]:
        """What a node has sent, by kind. Raises PayloadError."""
        with self.phases("decode"):
            return {
                message.kind: self.agreement.channel("up", message.kind)
                .decode(message.payload, round_number, report.client)
                .to(self.ranks.device)
                for message in report.messages
            }

    def _exchange(self, reports: list[Report], round_number: int) -> None:
        """Mix the models of this rank's nodes, and put the average of all nodes' into the server.

        If a payload has been refused nobody mixes, so that all know the same of each other.
        """
        server, store = self.server, self.clients.store
        inbox = {report.client: report for report in reports}
        all_arrived = not any(report.failure.startswith(REFUSED) for report in reports)
        averaged = server.parameters.detach(), server.buffers
        sums = [torch.zeros_like(vector, dtype=torch.int64) for vector in averaged]
        counters = torch.zeros_like(server.buffers)
        for node in self._own(list(inbox)):
            state = store.get_staged(node)
            if all_arrived:
                state = self._mixed(node, state, inbox, round_number)
                store.stage(node, state, round_number)
            vectors = [state[key].to(self.ranks.device) for key in ("model", "buffers")]
            for total, vector in zip(sums, vectors, strict=True):
                total += (vector.double() / UNIT).round().long()
            counters = torch.maximum(counters, vectors[1])
        with self.phases("exchange"):
            for total in sums:
                self.ranks.sum_(total)
            self.ranks.maximum_(counters)
        parameters, buffers = ((total.double() * UNIT / len(inbox)).float() for total in sums)
        server.parameters.data.copy_(parameters)
        server.buffers = torch.where(server.is_counter, counters, buffers)

    def _mixed(self, node: int, state: State, inbox: dict[int, Report], round_number: int) -> State:
        """A node's state after its own message and its neighbours' have arrived."""
        device, before = self.ranks.device, state.get("pull")
        model, buffers = state["model"].to(device), torch.zeros_like(self.server.buffers)
        pull = torch.zeros_like(model) if before is None else before.to(device, copy=True)
        counters = buffers
        for sender, weight in self.weights[node].items():
            arrived = self._decode(inbox[sender], round_number)
            arrived["update"].add_to(pull, weight)
            if "buffers" in arrived:
                arrived["buffers"].add_to(buffers, weight)
                counters = torch.maximum(counters, arrived["buffers"].dense())
        own = self._decode(inbox[node], round_number)
        own["update"].add_to(pull, -1.0)
        after = State(model=model.add(pull, alpha=self.gamma), buffers=state["buffers"])
        if "buffers" in own:
            after["buffers"] = torch.where(self.server.is_counter, counters, buffers)
        if self.is_choco:
            estimate = state["estimate"].to(device, copy=True)
            own["update"].add_to(estimate)
            after |= State(pull=pull, estimate=estimate)
        return after

    # --- scores and the clock ---------------------------------------------------------------------

    def _evaluate(self, round_number: int, cohort: list[int]) -> dict[str, float | None]:
        """Scores of the average model, and after the last round of the nodes' own models too."""
        scores = super()._evaluate(round_number, cohort)
        if round_number == self.config.rounds:
            num_tested = len(self.pictures.labels["test"])
            mine = {node: self._num_right(node, num_tested) for node in self._own(cohort)}
            parts = self.ranks.gather_json(mine)
            right = [count for part in parts for count in part.values()]
            scores["node_accuracy_mean"] = sum(right) / len(right) / num_tested
            scores["node_accuracy_worst"] = min(right) / num_tested
        return scores

    def _num_right(self, node: int, num_tested: int) -> int:
        """How many of the test pictures a node's own model gets right."""
        model, size = self.models.of(node), self.config.evaluation.batch_size
        self.clients.load(model.parameters, model.buffers)
        task = self.model, self.pictures, self.clients.choices.precision, "test"
        starts = range(0, num_tested, size)
        return sum(sum(evaluate(*task, start, start + size)[0]) for start in starts)

    def _play(self, reports: list[Report], round_number: int) -> list[LedgerRow]:
        """Let the round pass: each node trains, and sends to one neighbour after the other."""
        for report in reports:
            neighbours = [node for node in self.weights[report.client] if node != report.client]
            sent = [
                replace(message, receiver=node, payload=None)
                for node in neighbours
                for message in report.messages
            ]
            seconds = self._computing_seconds(report, round_number)
            self.clock.start([(round_number, replace(report, messages=sent), seconds)])
        while self.clock.advance():
            pass
        return self.clock.take_rows(round_number)
