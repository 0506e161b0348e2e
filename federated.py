"""Federated training, round by round.

A round samples a cohort, broadcasts the model as a payload, trains each client from what that
payload decodes to, prunes and encodes what the clients learned, exchanges the payloads between
ranks, decodes and averages them in client order, lets the server's optimizer step, evaluates, and
writes it all down.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from channel import ErrorFeedback
from client import Interrupted, evaluate, local_lr, loss_gradient, train
from client_store import ClientStore
from cnn_model import FlatModel, build_network
from compression import NotFinite, encode
from config import Config, ConfigError
from data import Pictures, load_dataset, partition_labels
from distributed import Ranks, Report
from downlink import Message
from masks import encode_scores
from network import Device, Link, round_seconds
from runlog import LedgerRow, RunFolder
from server import Broadcast, Server


@dataclass
class Progress:
    """How far a run is; a checkpoint holds it."""

    round: int = 0  # rounds completed
    wall_seconds: float = 0.0
    simulated_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    evaluations: list[float] = field(default_factory=list)  # test accuracies, oldest first


class Federation:
    """Everything that a run holds in memory, and its rounds. Every rank has one."""

    def __init__(self, config: Config, ranks: Ranks, folder: RunFolder):
        self.config, self.ranks, self.folder = config, ranks, folder
        data, network = config.data, config.network
        self.dataset = ranks.together(
            lambda: load_dataset(data.name, data.root, data.fallback), main_first=True
        )
        self.pictures = self._pictures()
        self.clients = ranks.together(self._partition)  # client: int64 indices into the pictures
        self.model = ranks.together(self._build_model)
        self.server = ranks.together(lambda: Server(config, self.model))
        self.states: dict[int, int] = {}  # client: version of its saved state, of all ranks
        self.store = self._store()
        self.link = Link(network.uplink_mbps, network.downlink_mbps, network.latency_ms)
        self.hardware = Device(network.ms_per_example)
        self.precision = config.precision
        self.progress = Progress()
        self.before: dict[int, list[LedgerRow]] = {}  # client: messages from before round 1
        self.feedback = self._error_feedback()
        self.stop_requested = False

    def run_round(self) -> dict[str, Any]:
        """Do the next round and return its row of rounds.jsonl. Raises Interrupted."""
        begin, number = time.perf_counter(), self.progress.round + 1
        cohort = self.sample_cohort(number)
        if self.server.mask.awaits_scores:
            self.choose_mask(cohort)
        broadcast = self.server.broadcast(number, cohort)
        mine, reports = self.visit(cohort, partial(self.train_client, number, broadcast=broadcast))
        averaged = self.server.step(reports, number)
        self.settle(number, mine, averaged)
        self.server.commit(number, cohort)
        scores = self.evaluate(number)
        return self.write_down(number, begin, broadcast, reports, averaged, scores)

    def sample_cohort(self, number: int) -> list[int]:
        """clients.per_round different clients, ascending."""
        rng = np.random.default_rng(self.config.seed_for("cohort", number))
        clients = self.config.clients
        return sorted(rng.choice(clients.total, clients.per_round, replace=False).tolist())

    def visit(
        self, cohort: list[int], work: Callable[[int], Report]
    ) -> tuple[list[Report], list[Report]]:
        """Do `work` for the clients of the cohort, each on its rank. Raises Interrupted.

        Returns this rank's reports as they left it, and all ranks' as they arrived.
        """
        try:
            mine = [work(client) for client in cohort if self.ranks.owns(client)]
        except Interrupted:
            mine = None
        reports = self.ranks.exchange(mine)
        if reports is None:  # some rank was asked to stop: the round never happened
            self.store.discard()
            raise Interrupted
        return mine, reports

    def choose_mask(self, cohort: list[int]) -> None:
        """Before round 1 its cohort scores the weights: in the ledger this is round 0."""
        broadcast = self.server.broadcast(0, cohort)
        messages = {  # a dense system would send nothing yet
            client: [replace(message, dense=0) for message in some]
            for client, some in broadcast.messages.items()
        }
        broadcast = replace(broadcast, messages=messages)
        _, reports = self.visit(cohort, partial(self.score_client, broadcast=broadcast))
        self.server.choose_mask(reports)
        self.before = {r.client: self.ledger_rows(0, r, broadcast) for r in reports}

    def score_client(self, client: int, broadcast: Broadcast) -> Report:
        """How much each weight matters to the client's loss."""
        report = Report(client, len(self.clients[client]))
        gradient = self.gradient_of(0, client, broadcast)
        try:
            scores = encode_scores(gradient, broadcast.parameters, self.model.layout)
            report.payloads["scores"] = scores
        except NotFinite:
            report.failure = "the scores are not finite"
        return report

    def gradient_of(self, number: int, client: int, broadcast: Broadcast) -> Tensor:
        """A client's gradient at the weights that it received."""
        self.model.parameters.copy_(broadcast.parameters)
        self.model.buffers.copy_(broadcast.buffers)
        return loss_gradient(
            self.model,
            self.pictures,
            torch.from_numpy(self.clients[client]).to(self.ranks.device),
            self.config.local.batch_size,
            self.config.pruning.mask.batches,
            self.config.seed_for("mask", number, client),
            lambda: self.stop_requested,
        )

    def train_client(self, number: int, client: int, broadcast: Broadcast) -> Report:
        """Local training, then prune and encode what was learned and what is still owed."""
        config, model = self.config, self.model
        indices = torch.from_numpy(self.clients[client]).to(self.ranks.device)
        report = Report(client, len(indices))
        model.parameters.copy_(broadcast.parameters)
        model.buffers.copy_(broadcast.buffers)
        report.loss = train(
            model,
            self.pictures,
            indices,
            config.local,
            local_lr(config.local, number, config.rounds),
            self.precision,
            config.seed_for("training", number, client),
            lambda: self.stop_requested,
            self.server.pruned,
        )
        update = model.parameters.cpu() - broadcast.parameters
        try:
            if model.buffer_layout.size:
                report.payloads["buffers"], _ = encode(model.buffers.cpu(), model.buffer_layout)
            if self.server.mask.grows_in(number):
                self.ask_for_growth(report, number, broadcast)
            self.send(report, number, update)
        except NotFinite:
            report.failure, report.payloads = "the update is not finite", {}
        return report

    def ask_for_growth(self, report: Report, number: int, broadcast: Broadcast) -> None:
        """Say which weights outside the mask the loss at the received model asks for most."""
        gradient = self.gradient_of(number, report.client, broadcast)
        payload, report.num_asked = self.server.mask.encode_growth(gradient, number)
        report.payloads["growth"] = payload

    def send(self, report: Report, number: int, update: Tensor) -> None:
        """Encode an update and what is owed into a report; keep what does not travel."""
        client, kept = report.client, {}
        if self.feedback:
            owed = self.store.get(client)
            if self.server.pruned is not None:  # weights that are gone since are owed nothing
                owed = {key: t.masked_fill(self.server.pruned, 0.0) for key, t in owed.items()}
            kept = self.feedback.add(update, owed)
        payload, sent = self.server.uplink.encode(update, number, client)
        report.payloads["update"], report.nonzeros = payload, len(sent.values)
        if self.feedback:
            self.store.stage(client, self.feedback.subtract(update, sent, kept), number)

    def settle(self, number: int, mine: list[Report], averaged: list[int]) -> None:
        """Keep the new residuals; what the server refused is owed again, so nothing is lost.

        mine: the reports of this rank's clients as they left it.
        """
        for report in mine:
            if report.client in self.store.staged and report.client not in averaged:
                state = self.store.get_staged(report.client)
                payload = report.payloads["update"]
                sent = self.server.uplink.decode(payload, number, report.client)
                sent.add_to(state["residual"])
                self.store.stage(report.client, state, number)
        self.store.commit()

    def evaluate(self, number: int) -> dict[str, float | None]:
        """Test accuracy and loss, if they are due; the batches are shared out over the ranks."""
        every, size = self.config.evaluation.every, self.config.evaluation.batch_size
        if number % every and number != self.config.rounds:
            return {"test_accuracy": None, "test_loss": None}
        self.model.parameters.copy_(self.server.parameters.detach())
        self.model.buffers.copy_(self.server.buffers)
        total = self.pictures.num_test
        starts = list(range(0, total, size))
        mine = {
            start: evaluate(
                self.model, self.pictures, self.precision, start, min(start + size, total)
            )
            for start in starts[self.ranks.rank :: self.ranks.size]
        }
        scores = {int(k): v for part in self.ranks.gather_json(mine) for k, v in part.items()}
        accuracy = sum(scores[start][0] for start in starts) / total
        self.progress.evaluations.append(accuracy)
        loss = sum(scores[start][1] for start in starts) / total
        return {"test_accuracy": accuracy, "test_loss": loss if np.isfinite(loss) else None}

    def write_down(
        self,
        number: int,
        begin: float,
        broadcast: Broadcast,
        reports: list[Report],
        averaged: list[int],
        scores: dict[str, float | None],
    ) -> dict[str, Any]:
        """Move the clocks on and log the round: a row of rounds.jsonl, a ledger row a message."""
        by_client = [self.ledger_rows(number, report, broadcast) for report in reports]
        messages = [row for rows in by_client for row in rows]
        lasted = round_seconds(map(self.client_seconds, reports, by_client))
        progress = self.progress
        progress.round = number
        progress.simulated_seconds += lasted
        up = sum(row.bytes for row in messages if row.direction == "up")
        down = sum(row.bytes for row in messages if row.direction == "down")
        progress.bytes_up += up
        progress.bytes_down += down
        losses = [r.loss for r in reports if r.client in averaged]
        loss = sum(losses) / max(1, len(losses))
        wall = time.perf_counter() - begin
        progress.wall_seconds += wall
        row = {
            "round": number,
            "num_clients": len(averaged),
            "num_failed": len(reports) - len(averaged),
            "failures": {str(r.client): r.failure for r in reports if r.failure},
            "lr": local_lr(self.config.local, number, self.config.rounds),
            "train_loss": loss if losses and np.isfinite(loss) else None,
            **scores,
            "bytes_up": up,
            "bytes_down": down,
            "simulated_seconds": lasted,
            "wall_seconds": wall,
        }
        if self.ranks.is_main:
            self.folder.append(row, messages)
        return row

    def ledger_rows(self, number: int, report: Report, broadcast: Broadcast) -> list[LedgerRow]:
        """A row for each message between the server and one client."""
        size, num_buffers = self.model.layout.size, self.model.buffer_layout.size
        numbers = {  # by kind: what the payload carries, and what a dense system sends in its place
            "update": (report.nonzeros, size),
            "buffers": (num_buffers, num_buffers),
            "scores": (size, 0),
            "growth": (report.num_asked, 0),
        }
        up = [Message(kind, payload, *numbers[kind]) for kind, payload in report.payloads.items()]
        rows = self.before.pop(report.client, [])
        for direction, messages in (("down", broadcast.messages[report.client]), ("up", up)):
            for m in messages:
                seconds = self.link.seconds(len(m.payload), direction)
                row = (number, report.client, direction, m.kind, len(m.payload), 4 * m.dense)
                rows.append(LedgerRow(*row, m.numbers, seconds))
        return rows

    def client_seconds(self, report: Report, messages: list[LedgerRow]) -> float:
        """A client's simulated round: receive, train, send; and look at gradients for the mask."""
        local, batch = self.config.local, min(self.config.local.batch_size, report.num_examples)
        trained = local.steps * batch if local.steps else local.epochs * report.num_examples
        if any(row.kind in ("scores", "growth") for row in messages):
            trained += self.config.pruning.mask.batches * batch
        return sum(row.seconds for row in messages) + self.hardware.seconds(trained)

    def save(self) -> None:
        """Write a checkpoint of the last completed round; a finished run needs no residuals."""
        done = self.progress.round == self.config.rounds
        changed = {} if done else self.store.save()
        for part in self.ranks.gather_json(changed):
            self.states |= {int(client): version for client, version in part.items()}
        hashes = self.ranks.gather_json(self.server.sha256())
        if len(set(hashes)) > 1:
            raise RuntimeError(
                f"the ranks' models differ after round {self.progress.round}: {hashes}"
            )
        if self.ranks.is_main:
            state = {
                "precision": self.precision,
                "clients": {} if done else self.states,
                "progress": vars(self.progress),
                "before": {client: list(map(tuple, rows)) for client, rows in self.before.items()},
            }
            self.folder.save(state | self.server.state())
        self.ranks.gather_json(None)  # nobody goes on before the checkpoint stands
        self.store.drop_replaced()

    def load(self, state: dict[str, Any]) -> None:
        self.precision = state["precision"]
        self.progress = Progress(**state["progress"])
        self.before = {c: [LedgerRow(*row) for row in rows] for c, rows in state["before"].items()}
        self.server.load(state)
        self.states = state["clients"]
        self.store = self._store()

    def _store(self) -> ClientStore:
        budget = self.config.clients.state_memory_gib * 2**30
        owned = {c: version for c, version in self.states.items() if self.ranks.owns(c)}
        return ClientStore(self.folder.clients, budget, owned)

    def _error_feedback(self) -> ErrorFeedback | None:
        """None if nothing can be owed."""
        config, up = self.config, self.config.uplink
        lossless = config.pruning.method == "none" and up.values == "fp32"
        if not up.error_feedback or lossless and not up.momentum:
            return None
        return ErrorFeedback(up.decay, up.momentum)

    def _pictures(self) -> Pictures:
        data, side = self.config.data, self.dataset.train_images.shape[1]
        padding = side // 8 if data.padding is None else data.padding
        flip = self.dataset.name != "digits" if data.flip is None else data.flip
        return Pictures(self.dataset, self.ranks.device, padding, flip)

    def _partition(self) -> list[np.ndarray]:
        config = self.config
        clients = partition_labels(
            self.dataset.train_labels.numpy(),
            config.clients.total,
            config.data.partition.name,
            config.data.partition.args,
            config.seed_for("partition"),
        )
        smallest = min(range(len(clients)), key=lambda client: len(clients[client]))
        alone = min(len(clients[smallest]), config.local.batch_size) == 1
        if alone and config.model.norm == "batch" and config.model.name.startswith("resnet"):
            raise ConfigError(
                f"model.norm: batch cannot train on batches of one example (client {smallest} has "
                f"{len(clients[smallest])}, local.batch_size={config.local.batch_size}); "
                f"use group(2)"
            )
        return clients

    def _build_model(self) -> FlatModel:
        model, pictures = self.config.model, self.pictures
        try:
            network = build_network(
                model.name,
                pictures.num_classes,
                pictures.image_size,
                self.config.seed_for("network"),
                model.stem,
                model.norm,
                model.width,
            )
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None
        return FlatModel(network, self.ranks.device)
