"""What every schedule has: both ends, the ranks, the simulated clock, scores, logs, checkpoints.

A schedule is a subclass in a file of its own. Its run_round() says who trains when and from which
model.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from compression import Memory
from config import Config, ConfigError
from distributed import Ranks
from federation.client_store import ClientStore
from federation.cohort import Placement
from federation.exchange import Exchange
from federation.ledger import LedgerRow
from federation.messages import Broadcast, Report
from federation.phases import Phases
from federation.pipeline import Pipeline, num_coding_threads
from federation.progress import Progress
from federation.server import Server
from federation.setup import (
    build_model,
    build_models,
    client_data,
    count_widths,
    load_data,
    make_clients,
    make_clock,
    make_pictures,
    make_server,
    make_store,
    make_submodel_clients,
    make_submodel_server,
    partition,
)
from federation.uplink import LocalUpdate
from federation.utilisation import utilisation
from federation.workload import Workload
from training.choices import Choices
from training.evaluation import SHARED, evaluate_models
from training.local_sgd import local_lr
from training.memory import memory_governed_by
from training.speed import probe_speed
from training.static_norm import static_statistics

T = TypeVar("T")
Encode = Callable[[Memory], Report]  # encodes what a client has learned, on any thread


class Federation:
    """Everything that a run holds in memory. Every rank has one.

    states_folder: where clients' states go that do not fit into memory. ms_per_example: of this
    machine, as an earlier start of the run has measured it; 0: it is measured if need be.
    """

    def __init__(
        self, config: Config, ranks: Ranks, states_folder: Path, ms_per_example: float = 0.0
    ):
        self.config, self.ranks = config, ranks
        if ranks.use_deepspeed:
            from training.deepspeed_engine import read_config

            ranks.on_all_ranks(lambda: read_config(config))  # a mistake in it is answered now
        self._load_data()
        self.model = ranks.on_all_ranks(lambda: build_model(config, self.pictures, ranks.device))
        self.ms_per_example = ms_per_example
        if config.network.is_measured and not ms_per_example:
            self.ms_per_example = self._measure()
        self.clock = ranks.on_all_ranks(lambda: make_clock(config, self.ms_per_example))
        self.models = ranks.on_all_ranks(lambda: build_models(config, self.pictures, self.model))
        self.workload = ranks.on_all_ranks(lambda: self._make_workload(config))
        self.widths = self.workload.widths
        self.candidates = self.widths.candidates  # int64: clients that take part
        self._check_candidates()
        self._make_ends(self.workload.config, make_store(config, states_folder, ranks.device))
        self.versions: dict[int, int] = {}  # client: version of its saved state, of all ranks
        self.placement = Placement(ranks, [])
        self.pipeline = Pipeline(ranks.device, num_coding_threads(ranks.device))
        self.phases = Phases()
        sums = config.distributed.exchange == "allreduce"
        self.exchange = Exchange(ranks, sums, self.phases)
        self.progress = Progress()
        self.received = 0  # bytes that collectives had brought to this rank up to the last round

    def _measure(self) -> float:
        """Milliseconds that the main rank trains on an example."""
        work = partial(probe_speed, self.model, self.pictures, self.config.local)
        measured = self.ranks.on_all_ranks(lambda: work() if self.ranks.is_main else 0.0)
        return self.ranks.gather_json(measured)[0]

    def _load_data(self) -> None:
        config, ranks = self.config, self.ranks
        self.dataset = ranks.on_all_ranks(lambda: load_data(config), main_first=True)
        self.shards = ranks.on_all_ranks(lambda: partition(config, self.dataset))
        self.client_data = ranks.on_all_ranks(
            lambda: client_data(config, self.dataset, self.shards)
        )
        self.pictures = ranks.on_all_ranks(
            lambda: make_pictures(config, self.client_data, ranks.device)
        )
        labels, num_classes = self.dataset.train_labels.numpy(), self.pictures.num_classes
        self.labels_per_client = np.array(
            [np.bincount(labels[indices], minlength=num_classes) for indices in self.shards]
        )
        self.num_examples = np.array(list(map(len, self.shards)))

    def _make_workload(self, config: Config) -> Workload:
        """How much each client trains and sends. Raises ConfigError."""
        choices = count_widths(config, self.pictures, self.models, self.clock.population)
        sends_buffers = config.model.norm_policy == "average"
        num_buffers = self.model.buffer_layout.size if sends_buffers else 0
        return Workload(config, self.clock, self.num_examples, choices, num_buffers)

    def _check_candidates(self) -> None:
        """Raises ConfigError if too few clients have the memory to take part."""
        cohort, number = self.config.clients.per_round, len(self.candidates)
        if number < cohort:
            raise ConfigError(
                f"clients.per_round: {cohort} is more than the {number} clients that take part; "
                f"{self.widths.describe()[0]}"
            )

    def _make_ends(self, config: Config, store: ClientStore) -> None:
        """The server and the clients of this rank."""
        ranks, num_examples = self.ranks, self.num_examples.tolist()
        at_the_clients = self.pictures, self.shards, store, ranks
        if config.submodel.widths:
            both = config, self.models, self.widths
            self.server = ranks.on_all_ranks(lambda: make_submodel_server(*both, num_examples))
            self.clients = ranks.on_all_ranks(lambda: make_submodel_clients(*both, *at_the_clients))
        else:
            self.server = ranks.on_all_ranks(lambda: make_server(config, self.model, num_examples))
            self.clients = make_clients(config, self.model, *at_the_clients)

    @property
    def num_at_once(self) -> int:
        """How many clients of one network a team of ranks has to train at a time, about."""
        widths = len(self.config.submodel.widths) or 1
        return -(-self.config.clients.per_round // (self.ranks.num_teams * widths))

    # --- the parts of a round ---------------------------------------------------------------------

    def run_round(self) -> tuple[dict[str, Any], list[LedgerRow]]:
        """Do the next round. Raises Interrupted, and then the round never happened.

        Returns its row of rounds.jsonl and its rows of the ledger.
        """
        raise NotImplementedError

    def _broadcast(self, server: Server, round_number: int, cohort: list[int]) -> Broadcast:
        """What the server, or an edge server, sends to these clients, on the device."""
        with self.phases("encode"):
            return server.broadcast(round_number, cohort)

    def _train(
        self, cohort: list[int], round_number: int, broadcast: Broadcast
    ) -> Iterator[Encode]:
        """Train this rank's clients; of each return what encodes the update.

        In a round that is evaluated, the cohort's first client describes what it sends.
        """
        described = cohort[:1] if self._is_evaluated(self.progress.round_number + 1) else []
        with memory_governed_by("local.batch_size"):
            for update in self.clients.train(self._own(cohort), round_number, broadcast):
                update.is_described = update.report.client in described
                yield partial(self._encode, update, round_number)

    def _encode(self, trained: LocalUpdate, round_number: int, memory: Memory) -> Report:
        """What a client sends, on any thread."""
        return self.clients.uplink.encode(trained, round_number, memory)

    def _score(self, cohort: list[int], broadcast: Broadcast) -> Iterator[Encode]:
        """The same for the scores of the weights."""
        for client in self._own(cohort):
            scored = self.clients.score(client, broadcast)
            yield partial(self.clients.uplink.encode_scores, *scored)

    def _own(self, cohort: list[int]) -> list[int]:
        """The clients that this rank's team trains, once they have been placed."""
        return list(filter(self.placement.is_here, cohort))

    def _place(self, cohort: list[int]) -> None:
        """Decide which rank trains whom, by the work that each client has."""
        costs = {client: float(self.workload.work[client]) for client in cohort}
        self.placement.place(costs, self.clients.store)

    def _arrivals(
        self, trained: Iterator[Encode], then: Callable[[Report], T], keep: bool = False
    ) -> Iterator[tuple[Report, T]]:
        """The reports of all ranks' clients in client order, and what `then` makes of each.

        trained: trains a client and returns what encodes it, and so on; it has not begun yet. then:
        work for any thread, such as decoding. With one rank a report is passed on as it comes, so
        that its payloads need not be kept unless `keep` says so, or lanes train the clients in
        another order. Raises Interrupted.
        """

        def encoded(encode: Encode, memory: Memory) -> Report:
            with self.phases("encode"):
                return encode(memory)

        def with_more(report: Report) -> tuple[Report, T]:
            with self.phases("decode"):
                return report, then(report)

        self.pipeline.clear()
        trained = (partial(encoded, encode) for encode in self.phases.each("train", trained))
        if self.ranks.size == 1:
            jobs = (lambda memory, e=encode: with_more(e(memory)) for encode in trained)
            in_order = self.clients.num_lanes == 1
            arrivals = self.pipeline.run(jobs, keep=keep or not in_order)
            yield from arrivals if in_order else sorted(arrivals, key=lambda pair: pair[0].client)
            return
        leads = self.ranks.team.is_leader
        own = (report for report in self.pipeline.run(trained, keep=True) if leads)
        reports = self.exchange.gather(own)
        yield from self.pipeline.run((lambda _, r=r: with_more(r) for r in reports), keep=True)

    def _evaluate(self, round_number: int, cohort: list[int]) -> dict[str, float | None]:
        """Scores of the model, or of the cohort's models with their own norm layers, if due."""
        if not self._is_evaluated(round_number):
            return {"test_accuracy": None, "test_loss": None}
        server, clients, evaluation = self.server, self.clients, self.config.evaluation
        memory = memory_governed_by("evaluation.batch_size")
        with self.phases("evaluate"), memory, self._statistics():
            scores = evaluate_models(
                [SHARED] if clients.own_positions is None else cohort,
                lambda c: clients.load(
                    server.parameters.data, server.buffers, clients.store.get(c)
                ),
                self.model,
                self.pictures,
                clients.choices.precision,
                evaluation.batch_size,
                self.ranks,
                self.placement.holds_state,
                self.labels_per_client,
            )
        self.progress.evaluations.append(scores)
        return scores

    def _is_evaluated(self, round_number: int) -> bool:
        every, last = self.config.evaluation.every, self.config.rounds
        return round_number % every == 0 or round_number == last

    def _statistics(self) -> AbstractContextManager[None]:
        """Where BatchNorm is static: the statistics of the server's model, for its evaluation."""
        model = self.config.model
        if model.norm_policy != "static" or not model.has_batch_norm:
            return nullcontext()
        self.clients.load(self.server.parameters.data, self.server.buffers)
        return static_statistics(
            self.model,
            self.pictures,
            self.clients.choices.precision,
            self.config.evaluation.batch_size,
            self.config.seed_for("statistics"),
        )

    # --- what is written down ---------------------------------------------------------------------

    def _record(
        self,
        round_number: int,
        begin: float,
        reports: list[Report],
        averaged: list[int],
        scores: dict[str, float | None],
        rows: list[LedgerRow],
        **more: Any,
    ) -> tuple[dict[str, Any], list[LedgerRow]]:
        """Move the progress on; return the row of rounds.jsonl, and the rows of the ledger.

        begin: when the round began on the wall's clock; the simulated clock stands at its end.
        more: columns of the schedule's own.
        """
        progress, lasted = self.progress, self.clock.now - self.progress.simulated_seconds
        progress.round_number, progress.simulated_seconds = round_number, self.clock.now
        up, down = progress.add_bytes(rows)
        late = [report.client for report in reports if report.is_late]
        failures = {str(r.client): r.failure for r in reports if r.failure and not r.is_late}
        progress.add_failures(failures)
        progress.num_late += len(late)
        left_out = {*late, *map(int, failures)}
        progress.empty_rounds = progress.empty_rounds + 1 if left_out and not averaged else 0
        wall = time.perf_counter() - begin
        progress.wall_seconds += wall
        row = {
            "round": round_number,
            "num_clients": len(averaged),
            "num_failed": len(failures),
            "num_late": len(late),
            "num_skipped_steps": sum(report.num_skipped_steps for report in reports),
            "failures": failures,
            "late": late,
            "lr": local_lr(self.config.local, round_number, self.config.rounds),
            "train_loss": _mean_loss(reports),
            **scores,
            **more,
            "residual_norm": _mean_residual(reports),
            **_described(reports),
            "bytes_up": up,
            "bytes_down": down,
            "bytes_between_ranks": self.ranks.bytes_received - self.received,
            "simulated_seconds": lasted,
            **utilisation(rows, averaged, left_out, self.clock.now - lasted, self.clock.now),
            "phase_seconds": self.phases.take(),
            "wall_seconds": wall,
        }
        self.received = self.ranks.bytes_received
        return row, rows

    def _computing_seconds(self, report: Report, round_number: int) -> float:
        """How long a client computes: it trains, and looks at gradients for the mask."""
        client = report.client
        num_examples = float(self.workload.work[client]) if round_number > 0 else 0.0
        if any(message.kind in ("scores", "growth") for message in report.messages):
            batch = min(self.config.local.batch_size, report.num_examples)
            num_examples += self.config.pruning.mask.batches * batch
        return float(self.clock.computing_seconds(client, num_examples))

    # --- checkpoints ------------------------------------------------------------------------------

    @property
    def is_done(self) -> bool:
        return self.progress.round_number == self.config.rounds

    @property
    def keeps_states(self) -> bool:
        """Whether clients' states are a result: FedBN's norm layers are."""
        return self.clients.own_positions is not None

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the last completed round holds, with the clients' states on disk.

        Called by all ranks. A finished run needs no states unless they are a result.
        """
        needs_none = self.is_done and not self.keeps_states
        changed = {} if needs_none else self.clients.store.save()
        for part in self.ranks.gather_json(changed):
            self.versions |= {int(client): version for client, version in part.items()}
        hashes = self.ranks.gather_json(self.server.sha256())
        if len(set(hashes)) > 1:
            raise RuntimeError(
                f"the ranks' models differ after round {self.progress.round_number}: {hashes}"
            )
        return self.server.state() | {
            "choices": vars(self.clients.choices),
            "clients": {} if needs_none else self.versions,
            "clients_mask": self.clients.mask.state(),
            "mask_round": self.clients.store.mask_round,
            "progress": vars(self.progress),
            "clock": self.clock.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.clients.choices = Choices(**state["choices"])
        self.progress = Progress(**state["progress"])
        self.clock.load(state["clock"])
        self.server.load(state)
        self.versions = state["clients"]
        self.placement = Placement(self.ranks, list(self.versions))
        self.clients.store.versions = self._versions_here()
        self.clients.load_mask(state["clients_mask"], state["mask_round"])

    def _versions_here(self) -> dict[int, int]:
        """The versions of the states that this rank holds, of those that a checkpoint names."""
        holds = self.placement.holds_state
        return {client: version for client, version in self.versions.items() if holds(client)}


def _mean_loss(reports: list[Report]) -> float | None:
    """The training loss of the clients that were averaged; None if there is no finite one."""
    losses = [report.loss for report in reports if not report.failure]
    loss = sum(losses) / max(1, len(losses))
    return loss if losses and np.isfinite(loss) else None


def _mean_residual(reports: list[Report]) -> float | None:
    """The root mean square of the norms of what the averaged clients owe; None if nobody owes."""
    norms = [r.residual_norm for r in reports if not r.failure and r.residual_norm is not None]
    mean = float(np.sqrt(np.mean(np.square(norms)))) if norms else np.inf
    return mean if np.isfinite(mean) else None


def _described(reports: list[Report]) -> dict[str, dict[str, int]]:
    """Columns of what a client's update consists of; empty if no client that counts says so."""
    described = [report for report in reports if report.bytes_by_part and not report.failure]
    names = "bytes_by_part", "bytes_by_tensor"
    return {name: getattr(described[0], name) if described else {} for name in names}
