"""The clients' part of a round, on the rank where they live: train, prune, encode, and remember.

server.py is the other end. What a client keeps between rounds is a dict of tensors in the store:
what it owes (residual, velocity), what its algorithm keeps, and perhaps its own norm layers.
"""

from dataclasses import replace

import torch
from torch import Tensor

from algorithms import FedAvg, State, reach
from cnn_model import FlatModel
from compression import NotFinite, all_finite, encode
from config import Config
from data import Pictures
from distributed import Report, Team
from federation.channel import ErrorFeedback
from federation.client_store import ClientStore
from federation.mask import encode_scores
from federation.server import Broadcast, Server
from training.engines import TorchEngine
from training.local_sgd import (
    Engine,
    Interrupted,
    batch_sizes,
    local_lr,
    loss_gradient,
    train_client,
)
from wire.container import Outbox

OWED = ("residual", "velocity")  # what error feedback keeps


class Trainer:
    """Trains clients one after the other in one network.

    clients: the int64 indices of each client's pictures; team: the ranks that train them together,
    whose leader keeps the states and encodes. Every method that trains raises Interrupted once
    stop_requested is set: between two batches, or in a team between two clients.
    """

    def __init__(
        self,
        config: Config,
        model: FlatModel,
        pictures: Pictures,
        clients: list[Tensor],
        server: Server,
        store: ClientStore,
        team: Team,
        use_deepspeed: bool,
    ):
        self.config, self.model, self.pictures, self.clients = config, model, pictures, clients
        self.server, self.algorithm, self.store = server, server.algorithm, store
        self.team, self.use_deepspeed = team, use_deepspeed
        self.outbox = Outbox()  # of this round's payloads
        self.engine: Engine | None = None
        self.pruned: Tensor | None = None  # the server's, on the device
        self.precision = config.precision
        self.feedback = _error_feedback(config)
        # A new vector for each update costs ten times the subtraction: the kernel zeroes its pages.
        # Error feedback needs one, for what it owes.
        self.update = None if self.feedback else torch.empty(model.layout.size, device=model.device)
        # FedBN (Li et al. 2021, arXiv 2102.07623): the norm layers are each client's own.
        own = config.model.norm_policy == "local"
        self.own_positions = model.norm_positions() if own else None
        self.own_aligned: Tensor | None = None  # the same positions in an aligned vector
        if own:
            marks = torch.zeros(model.layout.size, dtype=torch.bool)
            marks[self.own_positions] = True
            self.own_aligned = model.aligned(marks.to(model.device)).nonzero().flatten()
        self.stop_requested = False

    def train(self, number: int, client: int, broadcast: Broadcast) -> Report:
        """Local training, then prune and encode what was learned and what is still owed."""
        report, model = self._report(client), self.model
        if self._team_stops():
            raise Interrupted
        if report.failure:
            return report
        state = self._state(client)
        known = self.team.share({key: t for key, t in state.items() if key not in OWED})
        self.load(broadcast.parameters, broadcast.buffers, known)
        own = self.own_positions
        received = broadcast.parameters if own is None else model.read_parameters().clone()
        self.algorithm.before(
            model.aligned(received),
            {key: self._aligned(tensor.to(model.device)) for key, tensor in known.items()},
            self._aligned(broadcast.vector),
            lambda: self._gradient("control", number, client, None),
        )
        self._fit(report, number)
        if not self.team.is_leader:
            return report
        if not report.reach:
            report.fail("fp16 skipped every step")
            return report
        if self.feedback:  # the update becomes what is owed, so it counts from now on
            self.store.make_room(received.nbytes)
        update = torch.sub(model.read_parameters(), received, out=self.update)
        if own is not None:
            update[own] = 0
        try:
            aligned = model.aligned(update)
            kept, extra = self.algorithm.after(aligned, report.reach)
            update, extra = model.compact(aligned), self._compact(extra)
            kept = {key: self._compact(tensor) for key, tensor in kept.items()}
            if own is not None:
                kept["norm"] = torch.cat([model.read_parameters()[own], model.read_buffers()])
                if extra is not None:
                    extra[own] = 0
            if self.server.sends_buffers:
                payload, sent = encode(
                    model.read_buffers().cpu(), model.buffer_layout, memory=self.outbox.take
                )
                report.add("buffers", payload, len(sent.values))
            if self.server.mask.grows_in(number):
                self._ask_for_growth(report, number, broadcast, known)
            self._send(report, number, update.cpu(), extra, state, kept)
        except NotFinite:
            report.fail("the update is not finite")
        return report

    def score(self, client: int, broadcast: Broadcast) -> Report:
        """Before round 1: how much each weight matters to the client's loss."""
        report = self._report(client)
        if self._team_stops():
            raise Interrupted
        if report.failure or not self.team.is_leader:
            return report
        self.load(broadcast.parameters, broadcast.buffers)
        batches = self.config.pruning.mask.batches
        gradient = self.model.compact(self._gradient("mask", 0, client, batches))
        try:
            scores = encode_scores(gradient, broadcast.parameters, self.model.layout)
            report.add("scores", scores, self.model.layout.size)
        except NotFinite:
            report.fail("the scores are not finite")
        return report

    def settle(self, number: int, mine: list[Report], averaged: list[int]) -> None:
        """Keep the clients' new states, and see to it that nothing learned is lost.

        Of a client that the server refused, all that was sent is owed again, and the rest of its
        state is that of before. mine: the reports of this rank's clients as they left it.
        """
        for report in mine:
            if report.client in self.store.staged and report.client not in averaged:
                staged, state = self.store.get_staged(report.client), self.store.get(report.client)
                state = state | {key: staged[key] for key in OWED if key in staged}
                if self.feedback:
                    uplink, payload = self.server.uplinks["update"], report.payloads["update"]
                    uplink.decode(payload, number, report.client).add_to(state["residual"])
                self.store.stage(report.client, state, number)
        self.store.commit()

    def load(self, parameters: Tensor, buffers: Tensor, state: State | None = None) -> None:
        """Put a model into the network, with the norm layers of the client that kept `state`."""
        self.model.load(parameters, buffers)
        if state and "norm" in state:
            norm = state["norm"].to(self.model.device)
            own, buffers = norm.split([len(self.own_positions), self.model.buffer_layout.size])
            parameters = self.model.read_parameters().index_copy(
                0, self.own_positions.to(self.model.device), own
            )
            self.model.load(parameters, buffers)

    def _aligned(self, vector: Tensor | None) -> Tensor | None:
        """A vector over the parameters as training holds it; any other one stays as it is."""
        whole = vector is not None and len(vector) == self.model.layout.size
        return self.model.aligned(vector) if whole else vector

    def _compact(self, vector: Tensor | None) -> Tensor | None:
        return None if vector is None else self.model.compact(vector)

    def _report(self, client: int) -> Report:
        report = Report(client, len(self.clients[client]))
        if not report.num_examples:
            report.fail("it has no examples")
        return report

    def _stops(self) -> bool:
        """A member of a team must not leave the others in the middle of a client."""
        return self.stop_requested and self.team.size == 1

    def _team_stops(self) -> bool:
        asked = torch.tensor(float(self.stop_requested), device=self.model.device)
        self.team.sum_(asked)
        return bool(asked)

    def _state(self, client: int) -> State:
        """What the client kept; of weights that have left the mask since, nothing."""
        state = self.store.get(client)
        gone = self.server.mask.gone_since(self.store.versions.get(client, 0))
        if gone is None:
            return state
        return {
            key: tensor.masked_fill(gone, 0.0) if len(tensor) == len(gone) else tensor
            for key, tensor in state.items()
        }

    def _fit(self, report: Report, number: int) -> None:
        """Train the model in the network on the client's pictures; note how it went."""
        local, indices = self.config.local, self.clients[report.client]
        lr = local_lr(local, number, self.config.rounds)
        pruned = self.server.pruned
        self.pruned = self._aligned(None if pruned is None else pruned.to(self.model.device))
        if self.engine is None:
            self.engine = self._make_engine()
        report.loss, report.num_skipped = train_client(
            self.engine,
            self.pictures,
            indices,
            local,
            lr,
            self.config.seed_for("training", number, report.client),
            self._stops,
            self._correct_gradient if self._corrects() else None,
        )
        steps = len(batch_sizes(local, len(indices))) - report.num_skipped
        report.reach = reach(lr, steps, local.momentum, local.nesterov)

    def _make_engine(self) -> Engine:
        """Only now: its precision has been settled since the start."""
        if self.use_deepspeed:
            from training.deepspeed_engine import DeepSpeedEngine  # takes seconds

            folder = self.config.run_folder
            return DeepSpeedEngine(self.model, self.config, self.precision, self.team, folder)
        return TorchEngine(self.model, self.config.local, self.precision, self.team)

    def _corrects(self) -> bool:
        corrects = type(self.algorithm).gradient is not FedAvg.gradient
        return corrects or self.server.pruned is not None

    def _correct_gradient(self, x: Tensor, gradient: Tensor) -> None:
        """The algorithm's correction, but of a client's own norm layers.

        Weights that are pruned get no gradient, and so never leave 0.
        """
        own = self.own_aligned
        uncorrected = None if own is None else gradient[own]
        self.algorithm.gradient(x, gradient)
        if own is not None:
            gradient[own] = uncorrected
        if self.pruned is not None:
            gradient.masked_fill_(self.pruned, 0.0)

    def _gradient(self, purpose: str, number: int, client: int, batches: int | None) -> Tensor:
        """A client's gradient at the weights in the network, an aligned vector."""
        return loss_gradient(
            self.model,
            self.pictures,
            self.clients[client],
            replace(self.config.local, epochs=1, steps=batches),
            self.config.seed_for(purpose, number, client),
            self._stops,
        )

    def _ask_for_growth(
        self, report: Report, number: int, broadcast: Broadcast, known: State
    ) -> None:
        """Say which weights outside the mask the loss at the received model asks for most."""
        self.load(broadcast.parameters, broadcast.buffers, known)
        batches = self.config.pruning.mask.batches
        gradient = self.model.compact(self._gradient("mask", number, report.client, batches))
        report.add("growth", *self.server.mask.encode_growth(gradient.cpu(), number))

    def _send(
        self,
        report: Report,
        number: int,
        update: Tensor,
        extra: Tensor | None,  # what the algorithm sends besides
        state: State,  # before the round
        kept: State,  # after it, as far as the algorithm goes
    ) -> None:
        """Encode an update and what is owed into a report; keep what does not travel."""
        client, uplinks = report.client, self.server.uplinks
        after = self.feedback.add(update, state) if self.feedback else {}
        memory = self.outbox.take
        payload, sent = uplinks["update"].encode(update, number, client, memory)
        report.add("update", payload, len(sent.values))
        if self.feedback:
            kept |= self.feedback.subtract(update, sent, after)
        if extra is not None:
            kind = self.algorithm.up
            payload, sent = uplinks[kind].encode(extra.cpu(), number, client, memory)
            report.add(kind, payload, len(sent.values))
            kept[kind] = state[kind].clone() if kind in state else torch.zeros_like(update)
            sent.add_to(kept[kind])
        kept = {key: tensor.cpu() for key, tensor in kept.items()}
        if not all(map(all_finite, kept.values())):
            raise NotFinite
        if kept:
            self.store.stage(client, kept, number)


def _error_feedback(config: Config) -> ErrorFeedback | None:
    """None if nothing can be owed."""
    up = config.uplink
    lossless = config.pruning.method == "none" and up.values == "fp32"
    if not up.error_feedback or lossless and not up.momentum:
        return None
    return ErrorFeedback(up.decay, up.momentum)
