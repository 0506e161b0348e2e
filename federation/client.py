"""The clients' part of a round, on the rank where they live: train, prune, encode, remember.

server.py is the other end. train() works on the device and encode() on the CPU; what the first
hands to the second is a LocalUpdate, so a thread may encode one client while the device trains the
next.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms import LocalRound, step_length
from cnn_model import FlatModel
from compression import NotFinite, PayloadMemory, all_finite
from config import Config
from data import Pictures
from distributed import Team
from federation.agreement import Agreement
from federation.channel import ErrorFeedback
from federation.client_store import ClientStore, State
from federation.messages import SERVER, Broadcast, Buffer, Report
from pruning import snip_scores
from training.correction import Correction
from training.engines import Engine
from training.graph_engine import make_engine as make_torch_engine
from training.lanes import Job, Lanes, group_by_steps
from training.local_sgd import Interrupted, batch_sizes, local_lr, loss_gradient, train_client

OWED = ("residual", "velocity")  # the fields of a State that error feedback keeps


@dataclass
class LocalUpdate:
    """What a client has learned, on the device of training, before any of it is encoded."""

    report: Report
    state: State = field(default_factory=dict)  # what the client kept before the round
    update: Tensor | None = None  # float32 [num_parameters]; None if there is nothing to send
    besides: Tensor | None = None  # float32 [num_parameters]: what the algorithm sends besides
    buffers: Tensor | None = None  # float32 [num_buffers]: None if they stay
    growth: Tensor | None = None  # float32 [num_parameters]: gradient that asks for weights
    norm: Tensor | None = None  # FedBN: weights of the client's norm layers, then the buffers
    algorithm: LocalRound = field(default_factory=LocalRound)
    lr: float = 0.0
    received: Tensor | None = None  # float32 [num_parameters]: the weights that it began with
    known: State = field(default_factory=dict)  # the part of the state that its team has, too
    loss: Tensor | float = 0.0  # mean over the batches


class Clients:
    """The clients that live on this rank, trained one after the other in one network, or in lanes.

    pictures_of: the int64 indices of each client's pictures; team: the ranks that train a client
    together, whose leader keeps the states and encodes; make_engine: builds what trains, once the
    precision is known. Every method that trains raises Interrupted once stop_requested is set:
    between two batches, or in a team between two clients.
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
        self.precision = config.precision
        self.make_engine = make_engine or partial(make_torch_engine, model, config.local, team=team)
        # Both are built late, because what is `auto` is resolved late.
        self.engine: Engine | None = None
        self.lanes: Lanes | None = None
        one_by_one = make_engine or team.size > 1 or config.local.lanes == "auto"
        self.num_lanes = 1 if one_by_one else int(config.local.lanes)
        # Memory of the payloads that have not been decoded yet.
        self.payload_memory = PayloadMemory()
        self.sent: dict[int, Buffer] = {}  # by client: its update as it left, until owe_refused()
        self.feedback = _error_feedback(config)
        # A new vector for each update would cost ten times the subtraction, because the operating
        # system zeroes its pages. Error feedback needs one, for what the client will owe.
        self.update = None if self.feedback else torch.empty(model.layout.size, device=model.device)
        # FedBN (Li et al. 2021, arXiv 2102.07623): the norm layers are each client's own.
        own = config.model.norm_policy == "local"
        self.own_positions = model.norm_positions().to(model.device) if own else None
        self.own_aligned: Tensor | None = None  # the same positions in an aligned vector
        if own:
            marks = torch.zeros(model.layout.size, dtype=torch.bool, device=model.device)
            marks[self.own_positions] = True
            self.own_aligned = model.aligned(marks).nonzero().flatten()
        self.pruned: Tensor | None = None  # bool, aligned, on the device
        self._use_mask()
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
        left = self.agreement.use_mask(positions)
        self.store.forget(torch.from_numpy(left), self.agreement.layout.size, round_number)
        self._use_mask()

    def train(
        self, clients: list[int], round_number: int, broadcast: Broadcast
    ) -> Iterator[LocalUpdate]:
        """Train these clients from the model that they received. Raises Interrupted.

        With several lanes they train together, and come in the order of the lanes' groups. Only a
        team's leader gets the updates; without error feedback, an update is valid until the next
        one is asked for.
        """
        if self.num_lanes == 1:
            yield from (self._train_one(client, round_number, broadcast) for client in clients)
            return
        steps = [len(batch_sizes(self.config.local, len(self.pictures_of[c]))) for c in clients]
        for group in group_by_steps(steps, self.num_lanes):
            yield from self._train_in_lanes([clients[i] for i in group], round_number, broadcast)

    def encode(self, trained: LocalUpdate, round_number: int) -> Report:
        """Prune and encode what a client learned and still owes; stage what it keeps."""
        report = trained.report
        if trained.update is None:
            return report
        report.loss = float(trained.loss)
        try:
            if trained.buffers is not None:
                self._add(report, "buffers", trained.buffers, round_number)
            if trained.growth is not None:
                candidates = self.mask.growth_candidates(trained.growth, round_number)
                self._add(report, "growth", trained.growth, round_number, lambda *_: candidates)
            self._encode_update(trained, round_number)
        except NotFinite:
            report.fail("the update is not finite")
        return report

    def owe_refused(self, report: Report, round_number: int) -> None:
        """Of a client that the server refused, all that was sent is owed again.

        The rest of its state stays what it was before the round. report: as it arrived, perhaps
        damaged on the way.
        """
        client, sent = report.client, self.sent.pop(report.client, None)
        if not report.failure or client not in self.store.staged:
            return
        staged, state = self.store.get_staged(client), self.store.get(client)
        state = state | {key: staged[key] for key in OWED if key in staged}
        if self.feedback:
            channel = self.agreement.channel("up", "update")
            channel.decode(sent, round_number, client).add_to(state["residual"])
        self.store.stage(client, state, round_number)

    def score(self, client: int, broadcast: Broadcast) -> Report:
        """Before round 1: how much each weight matters to the client's loss (SNIP)."""
        report = self._report(client)
        if self._team_stops():
            raise Interrupted
        if report.failure or not self.team.is_leader:
            return report
        self.load(broadcast.parameters, broadcast.buffers)
        batches = self.config.pruning.mask.batches
        gradient = self.model.compact(self._gradient("mask", 0, client, batches))
        try:
            self._add(report, "scores", snip_scores(gradient, broadcast.parameters), 0)
        except NotFinite:
            report.fail("the scores are not finite")
        return report

    def load(self, parameters: Tensor, buffers: Tensor, state: State | None = None) -> None:
        """Put a model into the network, with the norm layers of the client that kept `state`."""
        model = self.model
        if state and "norm" in state:
            norm = state["norm"].to(model.device)
            own, buffers = norm.split([len(self.own_positions), model.buffer_layout.size])
            parameters = parameters.to(model.device).index_copy(0, self.own_positions, own)
        model.load(parameters, buffers)

    # --- training ---------------------------------------------------------------------------------

    def _train_one(self, client: int, round_number: int, broadcast: Broadcast) -> LocalUpdate:
        if self._team_stops():
            raise Interrupted
        trained = self._begin(client, round_number, broadcast)
        if trained.report.failure:
            return trained
        if self.engine is None:
            self.engine = self.make_engine(self.precision)
        task = self.pictures, self.pictures_of[client], self.config.local, trained.lr
        seed = self.config.seed_for("training", round_number, client)
        more = self._stops, self._correction(trained.algorithm)
        trained.loss, trained.report.num_skipped_steps = train_client(
            self.engine, *task, seed, *more
        )
        return self._finish(trained, round_number, broadcast)

    def _train_in_lanes(
        self, clients: list[int], round_number: int, broadcast: Broadcast
    ) -> Iterator[LocalUpdate]:
        """Train at most num_lanes clients at once."""
        local, model = self.config.local, self.model
        if self.lanes is None:
            self.lanes = Lanes(model, self.pictures, local, self.precision, self.num_lanes)
        begun, jobs = [], []
        for client in clients:
            trained = self._begin(client, round_number, broadcast)
            if trained.report.failure:
                yield trained
                continue
            begun.append(trained)
            seed = self.config.seed_for("training", round_number, client)
            vectors = model.parameters.clone(), model.buffers.clone()
            correction = self._correction(trained.algorithm)
            jobs.append(Job(self.pictures_of[client], trained.lr, seed, *vectors, correction))
        results = self.lanes.train(jobs, self._stops) if jobs else []
        for trained, result in zip(begun, results, strict=True):
            model.parameters.copy_(result.parameters)
            model.buffers.copy_(result.buffers)
            trained.loss = result.loss
            yield self._finish(trained, round_number, broadcast)

    def _begin(self, client: int, round_number: int, broadcast: Broadcast) -> LocalUpdate:
        """Put what a client received and kept into the network."""
        trained, model = LocalUpdate(self._report(client)), self.model
        if trained.report.failure:
            return trained
        trained.lr = local_lr(self.config.local, round_number, self.config.rounds)
        trained.state = self.store.get(client)
        known = self.team.broadcast({k: v for k, v in trained.state.items() if k not in OWED})
        self.load(broadcast.parameters, broadcast.buffers, known)
        trained.known, trained.received = known, broadcast.parameters
        if self.own_positions is not None:
            trained.received = model.read_parameters().clone()
        trained.algorithm = self.agreement.algorithm.before(
            model.aligned(trained.received),
            self._aligned(known.get("algorithm")),
            self._aligned(broadcast.vector),
            lambda: self._full_gradient(client, round_number),
        )
        return trained

    def _finish(self, trained: LocalUpdate, round_number: int, broadcast: Broadcast) -> LocalUpdate:
        """Take what the client, whose weights are in the network, has learned."""
        report, local = trained.report, self.config.local
        steps = len(batch_sizes(local, report.num_examples)) - report.num_skipped_steps
        report.step_length = step_length(trained.lr, steps, local.momentum, local.nesterov)
        if not self.team.is_leader:
            return trained
        if not steps:
            report.fail("fp16 skipped every step")
            return trained
        self._read(trained, trained.received)
        if self.mask.grows_in(round_number):
            self.load(broadcast.parameters, broadcast.buffers, trained.known)
            batches = self.config.pruning.mask.batches
            gradient = self._gradient("mask", round_number, report.client, batches)
            trained.growth = self.model.compact(gradient)
        return trained

    def _correction(self, algorithm: LocalRound) -> Correction | None:
        """What is done to each gradient; None if nothing is."""
        if not algorithm.corrects and self.pruned is None:
            return None
        return Correction(algorithm, self.own_aligned, self.pruned)

    def _read(self, trained: LocalUpdate, received: Tensor) -> None:
        """Take from the network what the client has learned."""
        model, own = self.model, self.own_positions
        if self.feedback:  # the update becomes what is owed, so it counts from now on
            self.store.make_room(received.nbytes)
        update = torch.sub(model.read_parameters(), received, out=self.update)
        if own is not None:
            update[own] = 0
        aligned = model.aligned(update)
        besides = trained.algorithm.after_training(aligned, trained.report.step_length)
        trained.update = model.compact(aligned)
        trained.besides = None if besides is None else model.compact(besides)
        if own is not None:
            trained.norm = torch.cat([model.read_parameters()[own], model.read_buffers()])
            if trained.besides is not None:
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

    # --- encoding ---------------------------------------------------------------------------------

    def _encode_update(self, trained: LocalUpdate, round_number: int) -> None:
        """Encode the update and what is owed; stage what does not travel for the next round."""
        report, state = trained.report, trained.state
        update, kept = trained.update.cpu(), State()
        after = self.feedback.add(update, state) if self.feedback else {}
        arrived = {"update": self._add(report, "update", update, round_number)}
        if self.feedback:
            kept |= self.feedback.subtract(update, arrived["update"], after)
            self.sent[report.client] = report.messages[-1].payload
        if trained.besides is not None:
            kind = self.agreement.algorithm.up
            arrived[kind] = self._add(report, kind, trained.besides, round_number)
        algorithm = trained.algorithm.after_sending(state.get("algorithm"), arrived)
        if algorithm is not None:
            kept["algorithm"] = algorithm
        if trained.norm is not None:
            kept["norm"] = trained.norm.cpu()
        if not all(map(all_finite, kept.values())):
            raise NotFinite
        if kept:
            self.store.stage(report.client, kept, round_number)

    def _add(self, report: Report, kind: str, vector: Tensor, round_number: int, select=None):
        """Encode a vector into a message of the report; return what arrives. Raises NotFinite."""
        channel, client = self.agreement.channel("up", kind), report.client
        payload, arrived = channel.encode(
            vector.cpu(), round_number, client, self.payload_memory.take, select
        )
        report.messages.append(
            self.agreement.message("up", kind, client, SERVER, payload, len(arrived.values))
        )
        return arrived

    # --- small things -----------------------------------------------------------------------------

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

    def _use_mask(self) -> None:
        self.pruned = self._aligned(self.mask.pruned)

    def load_mask(self, state: dict[str, Any]) -> None:
        """Go on with the mask of a checkpoint."""
        self.agreement.load_mask(state)
        self._use_mask()


def _error_feedback(config: Config) -> ErrorFeedback | None:
    """None if nothing can be owed."""
    up = config.uplink
    lossless = config.pruning.method == "none" and up.values == "fp32"
    if not up.error_feedback or lossless and not up.momentum:
        return None
    return ErrorFeedback(up.decay, up.momentum)
