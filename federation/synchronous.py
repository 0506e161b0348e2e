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

from algorithms import ALGORITHMS
from cnn_model import FlatModel, build_network
from config import Config, ConfigError, from_here
from data import Dataset, Pictures, hold_out, load_dataset, partition_labels
from distributed import Ranks, Report, place
from federation.client import Trainer
from federation.client_store import ClientStore
from federation.server import Broadcast, Server
from network.clock import Device, Link, round_seconds
from run_folder import LedgerRow, RunFolder
from training.evaluation import SHARED, evaluate_models
from training.local_sgd import Interrupted, local_lr


@dataclass
class Progress:
    """How far a run is; a checkpoint holds it."""

    round: int = 0  # rounds completed
    wall_seconds: float = 0.0
    simulated_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    evaluations: list[dict[str, float | None]] = field(default_factory=list)  # oldest first


class Federation:
    """Everything that a run holds in memory, and its rounds. Every rank has one."""

    def __init__(self, config: Config, ranks: Ranks, folder: RunFolder):
        self.config, self.ranks, self.folder = config, ranks, folder
        network = config.network
        if ranks.use_deepspeed:
            from training.deepspeed_engine import read_config

            ranks.together(lambda: read_config(config))  # a mistake in it is answered now
        self.dataset = ranks.together(self._load_data, main_first=True)
        self.pictures = ranks.together(self._pictures)
        self.clients = ranks.together(self._partition)  # client: int64 indices into the pictures
        labels, num_classes = self.dataset.train_labels.numpy(), self.pictures.num_classes
        self.labels_per_client = np.array(
            [np.bincount(labels[indices], minlength=num_classes) for indices in self.clients]
        )
        self.model = ranks.together(self._build_model)
        self.server = ranks.together(self._make_server)
        self.states: dict[int, int] = {}  # client: version of its saved state, of all ranks
        on_device = [torch.from_numpy(indices).to(ranks.device) for indices in self.clients]
        self.trainer = Trainer(
            config,
            self.model,
            self.pictures,
            on_device,
            self.server,
            self._store(),
            ranks.team,
            ranks.use_deepspeed,
        )
        self.link = Link(network.uplink_mbps, network.downlink_mbps, network.latency_ms)
        self.hardware = Device(network.ms_per_example)
        self.progress = Progress()
        self.received = 0  # bytes from other ranks up to the last round
        self.before: dict[int, list[LedgerRow]] = {}  # client: messages from before round 1

    def run_round(self) -> dict[str, Any]:
        """Do the next round and return its row of rounds.jsonl. Raises Interrupted."""
        begin, number = time.perf_counter(), self.progress.round + 1
        cohort = self.sample_cohort(number)
        if self.server.mask.awaits_scores:
            self.choose_mask(cohort)
        broadcast = self.server.broadcast(number, cohort).to(self.ranks.device)
        mine, reports = self.visit(cohort, partial(self.trainer.train, number, broadcast=broadcast))
        averaged = self.server.step(reports, number, self.ranks.add_up)
        self.trainer.settle(number, mine, averaged)
        self.server.commit(number, cohort)
        scores = self.evaluate(number, cohort)
        return self.write_down(number, begin, broadcast, reports, averaged, scores)

    def sample_cohort(self, number: int) -> list[int]:
        """clients.per_round different clients, ascending."""
        rng = np.random.default_rng(self.config.seed_for("cohort", number))
        clients = self.config.clients
        return sorted(rng.choice(clients.total, clients.per_round, replace=False).tolist())

    def visit(
        self, cohort: list[int], work: Callable[[int], Report]
    ) -> tuple[list[Report], list[Report]]:
        """Do `work` for the clients of the cohort, each by its team of ranks. Raises Interrupted.

        Returns the reports of this rank's clients as they left it, and all ranks' as they arrived.
        """
        self.place_cohort(cohort)
        self.trainer.outbox.clear()
        team, mine = self.ranks.team, []
        try:
            for client in cohort:
                if self.homes[client] == team.number:
                    report = work(client)
                    mine += [report] if team.is_leader else []
        except Interrupted:
            mine = None
        reports = self.ranks.exchange(mine)
        if reports is None:  # some rank was asked to stop: the round never happened
            self.trainer.store.discard()
            raise Interrupted
        return mine, reports

    def place_cohort(self, cohort: list[int]) -> None:
        """Place the cohort's clients on the teams, and move their states there by the disk."""
        costs = {client: float(self.num_trained(client)) for client in cohort}
        placed = place(costs, self.ranks.num_teams, self.homes)
        store, team = self.trainer.store, self.ranks.team
        leaving = [c for c in cohort if c in store.versions and placed[c] != team.number]
        leaves = {client: store.release(client) for client in leaving}
        self.homes |= placed
        if self.ranks.size > 1:
            for moved in self.ranks.gather_json(leaves):
                for client, (version, changed) in moved.items():
                    if placed[int(client)] == team.number and team.is_leader:
                        store.adopt(int(client), version, changed)

    def num_trained(self, client: int) -> int:
        """How many examples a client trains on in a round."""
        local, num_examples = self.config.local, len(self.clients[client])
        before = num_examples if local.option == 1 else 0  # SCAFFOLD's full gradient
        if local.steps:
            return before + local.steps * min(local.batch_size, num_examples)
        return before + local.epochs * num_examples

    def choose_mask(self, cohort: list[int]) -> None:
        """Before round 1 its cohort scores the weights: in the ledger this is round 0."""
        broadcast = self.server.broadcast(0, cohort).to(self.ranks.device)
        messages = {  # a dense system would send nothing yet
            client: [replace(message, dense=0) for message in some]
            for client, some in broadcast.messages.items()
        }
        broadcast = replace(broadcast, messages=messages)
        _, reports = self.visit(cohort, partial(self.trainer.score, broadcast=broadcast))
        self.server.choose_mask(reports, self.ranks.add_up)
        self.before = {r.client: self.ledger_rows(0, r, broadcast) for r in reports}

    def evaluate(self, number: int, cohort: list[int]) -> dict[str, float | None]:
        """Scores of the model, or of the cohort's models with their own norm layers, if due."""
        if number % self.config.evaluation.every and number != self.config.rounds:
            return {"test_accuracy": None, "test_loss": None}
        server, trainer, team = self.server, self.trainer, self.ranks.team
        scores = evaluate_models(
            [SHARED] if trainer.own_positions is None else cohort,
            lambda c: trainer.load(server.parameters.data, server.buffers, trainer.store.get(c)),
            self.model,
            self.pictures,
            trainer.precision,
            self.config.evaluation.batch_size,
            self.ranks,
            lambda client: self.homes[client] == team.number and team.is_leader,
            self.labels_per_client,
        )
        self.progress.evaluations.append(scores)
        return scores

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
            "num_skipped_steps": sum(r.num_skipped for r in reports),
            "failures": {str(r.client): r.failure for r in reports if r.failure},
            "lr": local_lr(self.config.local, number, self.config.rounds),
            "train_loss": loss if losses and np.isfinite(loss) else None,
            **scores,
            "bytes_up": up,
            "bytes_down": down,
            "bytes_between_ranks": self.ranks.bytes_received - self.received,
            "simulated_seconds": lasted,
            "wall_seconds": wall,
        }
        self.received = self.ranks.bytes_received
        if self.ranks.is_main:
            self.folder.append(row, messages)
        return row

    def ledger_rows(self, number: int, report: Report, broadcast: Broadcast) -> list[LedgerRow]:
        """A row for each message between the server and one client."""
        size, num_buffers = self.model.layout.size, self.model.buffer_layout.size
        dense = {
            "update": size,
            self.server.algorithm.up: size,
            "buffers": num_buffers,
        }  # the rest: 0
        messages = [
            ("down", m.kind, len(m.payload), m.dense, m.numbers)
            for m in broadcast.messages[report.client]
        ] + [
            ("up", kind, length, dense.get(kind, 0), report.numbers[kind])
            for kind, length in report.lengths.items()
        ]
        rows = self.before.pop(report.client, [])
        for direction, kind, length, in_place, numbers in messages:
            seconds = self.link.seconds(length, direction)
            row = (number, report.client, direction, kind, length, 4 * in_place, numbers, seconds)
            rows.append(LedgerRow(*row))
        return rows

    def client_seconds(self, report: Report, messages: list[LedgerRow]) -> float:
        """A client's simulated round: receive, train, send; and look at gradients for the mask."""
        trained = self.num_trained(report.client)
        if any(row.kind in ("scores", "growth") for row in messages):
            batch = min(self.config.local.batch_size, report.num_examples)
            trained += self.config.pruning.mask.batches * batch
        return sum(row.seconds for row in messages) + self.hardware.seconds(trained)

    def save(self) -> None:
        """Write a checkpoint of the last completed round.

        A finished run needs no states, but where they hold norm layers: those are a result.
        """
        done = self.progress.round == self.config.rounds and self.trainer.own_positions is None
        changed = {} if done else self.trainer.store.save()
        for part in self.ranks.gather_json(changed):
            self.states |= {int(client): version for client, version in part.items()}
        hashes = self.ranks.gather_json(self.server.sha256())
        if len(set(hashes)) > 1:
            raise RuntimeError(
                f"the ranks' models differ after round {self.progress.round}: {hashes}"
            )
        if self.ranks.is_main:
            state = {
                "precision": self.trainer.precision,
                "clients": {} if done else self.states,
                "progress": vars(self.progress),
                "before": {client: list(map(tuple, rows)) for client, rows in self.before.items()},
            }
            self.folder.save(state | self.server.state())
        self.ranks.gather_json(None)  # nobody goes on before the checkpoint stands
        if not done:  # rank 0 may be deleting all states by now
            self.trainer.store.drop_replaced()

    def load(self, state: dict[str, Any]) -> None:
        self.trainer.precision = state["precision"]
        self.progress = Progress(**state["progress"])
        self.before = {c: [LedgerRow(*row) for row in rows] for c, rows in state["before"].items()}
        self.server.load(state)
        self.states = state["clients"]
        self.trainer.store = self._store()

    def _store(self) -> ClientStore:
        budget = self.config.clients.state_memory_gib * 2**30
        team, num_teams = self.ranks.team, self.ranks.num_teams
        # client: the team whose leader holds its state
        self.homes = {client: client % num_teams for client in self.states}
        here = [c for c, home in self.homes.items() if home == team.number and team.is_leader]
        owned = {client: self.states[client] for client in here}
        return ClientStore(self.folder.clients, budget, owned)

    def _load_data(self) -> Dataset:
        data = self.config.data
        dataset = load_dataset(data.name, str(from_here(data.root)), data.fallback)
        if data.validation:
            dataset = hold_out(dataset, data.validation, self.config.seed_for("validation"))
        return dataset

    def _pictures(self) -> Pictures:
        data, side = self.config.data, self.dataset.train_images.shape[1]
        padding = data.padding
        if padding is None:
            padding = 0 if data.crop else side // 8
        flip = self.dataset.name != "digits" if data.flip is None else data.flip
        # On a CPU a ResNet whose stem leaves few pixels is a ninth faster with channels first:
        # nearly all of its time goes to weights. Elsewhere they are best last.
        tiny = self.config.model.stem == "imagenet" and (data.crop or side) < 64
        last = not (tiny and self.ranks.device.type == "cpu")
        return Pictures(self.dataset, self.ranks.device, padding, flip, data.crop, last)

    def _make_server(self) -> Server:
        local = self.config.local
        settings = {key: getattr(local, key) for key in ("mu", "alpha", "option")}
        given = {key: value for key, value in settings.items() if value is not None}
        algorithm = ALGORITHMS[local.algorithm](**given)
        return Server(self.config, self.model, algorithm, list(map(len, self.clients)))

    def _partition(self) -> list[np.ndarray]:
        config = self.config
        clients = partition_labels(
            self.dataset.train_labels.numpy(),
            config.clients.total,
            config.data.partition.name,
            config.data.partition.args,
            config.seed_for("partition"),
        )
        smallest = min(range(len(clients)), key=lambda client: len(clients[client]) or np.inf)
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
        return FlatModel(network, self.ranks.device, model.norm_policy == "frozen")
