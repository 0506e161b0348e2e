"""The clients' part of a round, on the rank where they live: receive, and train on the device.

server.py is the other end. What a client has learned is encoded by uplink.py. training hands it a
LocalUpdate, so that a thread may encode one client while the device trains the next.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms import LocalRound, step_length
from compression import Memory
from config import Config, Local
from data import Pictures
from distributed import Team
from federation.agreement import Agreement
from federation.client_store import OWED, ClientStore, State
from federation.messages import Broadcast, Report, without_payloads
from federation.pipeline import Pipeline, num_coding_threads
from federation.uplink import LocalUpdate, Uplink
from pruning import snip_scores
from training.choices import Choices
from training.correction import Correction
from training.engines import Engine
from training.flat_model import FlatModel
from training.graph_engine import make_engine as make_torch_engine
from training.lanes import Job, Lanes, group_by_steps
from training.local_sgd import (
    Interrupted,
    batch_sizes,
    local_lr,
    local_of,
    loss_gradient,
    train_client,
)
from training.logit_adjustment import adjustment


class Clients:
    """The clients that live on this rank, trained one after the other in one network, or in lanes.

    pictures_of: the int64 indices of each client's pictures; team: the ranks that train a client
    together, whose leader keeps the states and encodes (uplink); make_engine: builds what trains in
    a precision. Every method that trains raises Interrupted once stop_requested is set: between two
    batches, or in a team between two clients.
    """

    def __init__(
        self,
        config: Config,
        agreement: Agreement,
        model: FlatModel,
        pictures: Pictures,
        pictures_of: list[Tensor],
        store: ClientStore,
        team: Team,
        make_engine: Callable[[str], Engine] | None = None,
    ):
        self.config, self.agreement, self.mask = config, agreement, agreement.mask
        self.model, self.pictures, self.pictures_of = model, pictures, pictures_of
        self.store, self.team = store, team
        self.choices = Choices.of(config)  # what is auto there is decided before the first round
        self.make_engine = make_engine or partial(make_torch_engine, model, config.local, team=team)
        is_sgd = config.local.optimizer == "SGD"
        self.one_by_one = make_engine is not None or team.size > 1 or not is_sgd
        self.engine: Engine | None = None  # both are built with the first client that they train
        self.lanes: Lanes | None = None
        self.uplink = Uplink(config, agreement, store)
        # What brings a client its own copy of the model is encoded while others train, on a GPU.
        ahead = self.uplink.keeps_copies and team.size == 1
        threads = num_coding_threads(model.device) if ahead else 0
        self.reception = Pipeline(model.device, -(-threads // 2))
        # Whether an update takes the place of the weights that it comes from, which the next client
        # overwrites: memory of its own would cost more than the subtraction. Error feedback needs
        # its own, for what the client will owe; a mask that grows loads the received weights again;
        # and on a GPU updates wait to be encoded while the next client trains.
        grows = config.pruning.mask.method == "dynamic"
        self.in_place = not (self.uplink.feedback or grows) and model.device.type == "cpu"
        # FedBN (Li et al. 2021, arXiv 2102.07623): the norm layers are each client's own.
        own = config.model.norm_policy == "local"
        self.own_positions = model.norm_positions().to(model.device) if own else None
        self.own_aligned: Tensor | None = None  # the same positions in an aligned vector
        if own:
            marks = torch.zeros(model.layout.size, dtype=torch.bool, device=model.device)
            marks[self.own_positions] = True
            self.own_aligned = model.aligned(marks).nonzero().flatten()
        self.pruned: Tensor | None = None  # bool, aligned, on the device
        self._use_mask(0)
        self.stop_requested = False

    # --- a round ----------------------------------------------------------------------------------

    def receive(self, broadcast: Broadcast, round_number: int) -> None:
        """Take over the mask that the messages bring, if it has changed."""
        if broadcast.mask_version == self.mask.version:
            return
        message = next(
            message
            for messages in broadcast.messages.values()
            for message in messages
            if message.kind in ("mask", "mask_change")
        )
        positions = self.agreement.channel("down", message.kind).decode(message.payload)
        if message.kind == "mask_change":
            positions = np.setxor1d(self.mask.positions(), positions, assume_unique=True)
        self.agreement.use_mask(positions)
        self._use_mask(round_number)

    def train(
        self, clients: list[int], round_number: int, broadcast: Broadcast
    ) -> Iterator[LocalUpdate]:
        """Train these clients from the model that they received. Raises Interrupted.

        With several lanes they train together, and come in the order of the lanes' groups. Only a
        team's leader gets the updates; without error feedback, an update is valid until the next
        one is asked for. broadcast.of(): the model that a client begins with.
        """
        groups = [[client] for client in clients]
        if self.num_lanes > 1:
            steps = [len(batch_sizes(self._local(c), len(self.pictures_of[c]))) for c in clients]
            by_steps = group_by_steps(steps, self.num_lanes)
            groups = [[clients[i] for i in group] for group in by_steps]
        jobs = (partial(self._receive, client, broadcast) for client in chain(*groups))
        with closing(self.reception.run(jobs)) as received:  # no job outlives an interruption
            for group in groups:
                if self.num_lanes == 1:
                    yield self._train_one(next(received), round_number)
                else:
                    together = list(islice(received, len(group)))
                    yield from self._train_in_lanes(together, round_number)

    def score(self, client: int, broadcast: Broadcast) -> tuple[Report, Tensor | None]:
        """Before round 1: how much each weight matters to the client's loss (SNIP)."""
        report = self._report(client)
        report.received = without_payloads(broadcast.messages[client])
        if self._team_stops():
            raise Interrupted
        if report.failure or not self.team.is_leader:
            return report, None
        self.load(broadcast.parameters, broadcast.buffers)
        batches = self.config.pruning.mask.batches
        gradient = self.model.compact(self._gradient("mask", 0, client, batches))
        return report, snip_scores(gradient, broadcast.parameters)

    def load(self, parameters: Tensor, buffers: Tensor, state: State | None = None) -> None:
        """Put a model into the network, with the norm layers of the client that kept `state`."""
        model = self.model
        if state and "norm" in state:
            norm = state["norm"].to(model.device)
            own, buffers = norm.split([len(self.own_positions), model.buffer_layout.size])
            parameters = parameters.to(model.device).index_copy(0, self.own_positions, own)
        model.load(parameters, buffers)

    # --- training ---------------------------------------------------------------------------------

    def _train_one(self, trained: LocalUpdate, round_number: int) -> LocalUpdate:
        client = trained.report.client
        if self._team_stops():
            raise Interrupted
        if trained.report.failure:
            return trained
        self._begin(trained, round_number)
        if self.engine is None:
            self.engine = self.make_engine(self.choices.precision)
        task = self.pictures, self.pictures_of[client], self._local(client), trained.lr
        seed = self.config.seed_for("training", round_number, client)
        more = self._stops, self._correction(trained.algorithm)
        keeps = self.config.local.optimizer_state == "kept"
        if keeps:
            own = trained.known.items()
            self.engine.kept = {key: v for key, v in own if key.startswith("optimizer.")}
        trained.loss, trained.report.num_skipped_steps = train_client(
            self.engine, *task, seed, *more
        )
        if keeps:
            trained.optimizer = self.engine.kept
        return self._finish(trained, round_number)

    def _train_in_lanes(
        self, received: list[LocalUpdate], round_number: int
    ) -> Iterator[LocalUpdate]:
        """Train at most num_lanes clients at once."""
        local, model = self.config.local, self.model
        if self.lanes is None:
            precision = self.choices.precision
            self.lanes = Lanes(model, self.pictures, local, precision, self.num_lanes)
        begun, jobs = [], []
        for trained in received:
            if trained.report.failure:
                yield trained
                continue
            client = trained.report.client
            self._begin(trained, round_number)
            begun.append(trained)
            seed = self.config.seed_for("training", round_number, client)
            vectors = model.parameters.clone(), model.buffers.clone()
            more = self._correction(trained.algorithm), self._local(client).steps
            jobs.append(Job(self.pictures_of[client], trained.lr, seed, *vectors, *more))
        results = self.lanes.train(jobs, self._stops) if jobs else []
        for trained, result in zip(begun, results, strict=True):
            model.parameters.copy_(result.parameters)
            model.buffers.copy_(result.buffers)
            trained.loss = result.loss
            yield self._finish(trained, round_number)

    def _receive(self, client: int, broadcast: Broadcast, memory: Memory) -> LocalUpdate:
        """What a client has when it begins: what it kept, and what it received just now."""
        trained = LocalUpdate(self._report(client))
        trained.state = self.store.get(client)
        known = {key: kept for key, kept in trained.state.items() if key not in OWED}
        trained.known = self.team.broadcast(known)
        trained.broadcast = broadcast.of(client, trained.known.get("copy"))
        trained.report.received = without_payloads(trained.broadcast.messages.get(client, []))
        return trained

    def _begin(self, trained: LocalUpdate, round_number: int) -> None:
        """Put what a client received and kept into the network."""
        client, model = trained.report.client, self.model
        known, broadcast = trained.known, trained.broadcast
        trained.lr = local_lr(self.config.local, round_number, self.config.rounds)
        if self.store.is_older_than_mask(client):  # the client has it, even if it fails later
            self.store.stage(client, trained.state, round_number)
        self.load(broadcast.parameters, broadcast.buffers, known)
        trained.received = broadcast.parameters
        adjusts = self.config.local.logit_adjustment > 0
        if adjusts:  # until what was received is subtracted
            self._adjust_logits(client)
        if adjusts or self.own_positions is not None:
            trained.received = model.read_parameters().clone()
        trained.algorithm = self.agreement.algorithm.before(
            model.aligned(trained.received),
            self._aligned(known.get("algorithm")),
            self._aligned(broadcast.vector),
            lambda: self._full_gradient(client, round_number),
        )

    def _finish(self, trained: LocalUpdate, round_number: int) -> LocalUpdate:
        """Take what the client, whose weights are in the network, has learned."""
        report, local = trained.report, self._local(trained.report.client)
        steps = len(batch_sizes(local, report.num_examples)) - report.num_skipped_steps
        report.step_length = step_length(trained.lr, steps, local.momentum, local.nesterov)
        if not self.team.is_leader:
            return trained
        if not steps:
            report.fail("fp16 skipped every step")
            return trained
        self._read(trained, trained.received)
        if self.mask.grows_in(round_number):
            begun = trained.broadcast
            self.load(begun.parameters, begun.buffers, trained.known)
            batches = self.config.pruning.mask.batches
            gradient = self._gradient("mask", round_number, report.client, batches)
            trained.growth = self.model.compact(gradient)
        return trained

    def _adjust_logits(self, client: int) -> None:
        """Add the client's adjustment to the biases of the logits."""
        pictures, tau = self.pictures, self.config.local.logit_adjustment
        labels = pictures.train_labels[self.pictures_of[client]]
        self.model.head_bias.add_(adjustment(labels, pictures.num_classes, tau))

    def _correction(self, algorithm: LocalRound) -> Correction | None:
        """What is done to each gradient; None if nothing is."""
        if not algorithm.corrects and self.pruned is None:
            return None
        return Correction(algorithm, self.own_aligned, self.pruned)

    def _read(self, trained: LocalUpdate, received: Tensor) -> None:
        """Take from the network what the client has learned."""
        model, own = self.model, self.own_positions
        # The update becomes what is owed, so it counts from now on. On a GPU a thread that encodes
        # makes room: here it would wait for all that is queued.
        if self.uplink.feedback and model.device.type == "cpu":
            self.store.make_room(received.nbytes)
        learned = model.read_parameters()
        if own is not None:
            trained.norm = torch.cat([learned[own], model.read_buffers()])
        update = torch.sub(learned, received, out=learned if self.in_place else None)
        if own is not None:
            update[own] = 0
        aligned = model.aligned(update)
        besides = trained.algorithm.after_training(aligned, trained.report.step_length)
        trained.update = model.compact(aligned)
        trained.besides = None if besides is None else model.compact(besides)
        if own is not None and trained.besides is not None:
            trained.besides[own] = 0
        if self.agreement.sends_buffers:
            trained.buffers = model.read_buffers().clone()

    def _full_gradient(self, client: int, round_number: int) -> Tensor:
        """The gradient of what the client minimises, weight decay included, an aligned vector."""
        gradient = self._gradient("control", round_number, client, None)
        decay = self.config.local.weight_decay
        return gradient.add_(self.model.parameters, alpha=decay) if decay else gradient

    def _gradient(
        self, purpose: str, round_number: int, client: int, batches: int | None
    ) -> Tensor:
        """The gradient of a client's loss at the weights in the network, an aligned vector.

        batches: how many to look at; None means that all examples count once.
        """
        return loss_gradient(
            self.model,
            self.pictures,
            self.pictures_of[client],
            replace(self.config.local, epochs=1, steps=batches),
            self.config.seed_for(purpose, round_number, client),
            self._stops,
        )

    def _aligned(self, vector: Tensor | None) -> Tensor | None:
        """A vector over the parameters as training holds it, on the device."""
        return None if vector is None else self.model.aligned(vector.to(self.model.device))

    # --- the mask ---------------------------------------------------------------------------------

    def _use_mask(self, round_number: int) -> None:
        """Train and keep only the weights on the mask, which has changed in this round."""
        pruned = self.mask.pruned
        self.pruned = self._aligned(pruned)
        self.store.use_mask(pruned, round_number)

    def load_mask(self, state: dict[str, Any], round_number: int) -> None:
        """Go on with the mask of a checkpoint, which last changed in that round."""
        self.agreement.load_mask(state)
        self._use_mask(round_number)

    # --- small things -----------------------------------------------------------------------------

    @property
    def num_lanes(self) -> int:
        """How many clients train at once."""
        lanes = self.choices.lanes
        return 1 if self.one_by_one or lanes == "auto" else int(lanes)

    def _local(self, client: int) -> Local:
        """How this client trains."""
        return local_of(self.config.local, client)

    def _report(self, client: int) -> Report:
        report = Report(client, len(self.pictures_of[client]))
        if not report.num_examples:
            report.fail("it has no examples")
        return report

    def _stops(self) -> bool:
        """A member of a team must not leave the others in the middle of a client."""
        return self.stop_requested and self.team.size == 1

    def _team_stops(self) -> bool:
        if self.team.size == 1:  # no waiting for the device
            return self.stop_requested
        asked = torch.tensor(float(self.stop_requested), device=self.model.device)
        self.team.sum_(asked)
        return bool(asked)
