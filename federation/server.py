"""The server's part of a round: broadcast the model, decode and average updates, step.

Every rank holds this state and does these steps for itself, from the same bytes in the same order.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pruning
from afo import make_optimizer, make_scheduler
from algorithms import FedAvg
from cnn_model import FlatModel
from compression import Decoded, all_finite, decode, encode
from compressors.quantisers import parse_values
from config import Config, ConfigError, Downlink, Selection
from distributed import Report
from federation.channel import Channel
from federation.downlink import Changes, Message, WholeModel
from federation.mask import SharedMask
from wire.container import PayloadError

AddUp = Callable[[dict[str, Tensor], Tensor, list[Report]], None]


def alone(sums: dict[str, Tensor], largest: Tensor, reports: list[Report]) -> None:
    """Nothing to add: all payloads are here."""


@dataclass(frozen=True)
class Broadcast:
    """What the clients decode, float32 [n] each, and the messages that it came in."""

    parameters: Tensor
    vector: Tensor | None  # the algorithm's
    buffers: Tensor
    messages: dict[int, list[Message]]  # by client

    def to(self, device: torch.device) -> "Broadcast":
        """The same with the vectors on the device of training."""
        vector = None if self.vector is None else self.vector.to(device)
        vectors = dict(parameters=self.parameters.to(device), buffers=self.buffers.to(device))
        return replace(self, vector=vector, **vectors)


class Server:
    """The global vectors and the optimizer that steps them.

    parameters: float32 [num_parameters], stepped; vector: float32 [num_parameters], the client
    algorithm's, if it has one; buffers: float32 [num_buffers], averaged.
    """

    def __init__(
        self, config: Config, model: FlatModel, algorithm: FedAvg, num_examples: list[int]
    ):
        self.layout, self.buffer_layout = model.layout, model.buffer_layout
        self.parameters = torch.nn.Parameter(model.read_parameters().cpu().clone())
        self.buffers = model.read_buffers().cpu().clone()
        self.is_counter, self.is_variance = model.is_counter, model.is_variance
        self.sends_buffers = config.model.norm_policy == "average" and len(self.buffers) > 0
        self.algorithm = algorithm
        self.vector = torch.zeros(self.layout.size) if algorithm.has_vector else None
        seed = config.seed_for("mask")
        self.mask = SharedMask(config.pruning.mask, self.layout, config.rounds, seed)
        if self.mask.kept is not None:
            self.parameters.data.mul_(pruning.sparse_gains(self.mask.kept, self.layout.shapes))
        self._make_links(config)
        self.growth: Tensor | None = None  # float32 [n]: the average of the growth payloads
        self._use_mask()
        self.by_examples = config.server.weighting == "examples"
        self.total_weight = sum(num_examples) if self.by_examples else len(num_examples)
        self._make_optimizer(config)
        self.wants_norms = "mean_squared_norm" in self.optimizer.param_groups[0]

    def _make_optimizer(self, config: Config) -> None:
        server, self.scheduler = config.server, None
        names = ("lr", "momentum", "nesterov", "beta1", "beta2", "tau", "v0", "bias_correction")
        given = {name: getattr(server, name) for name in names if getattr(server, name) is not None}
        try:
            self.optimizer = make_optimizer(
                server.optimizer, self.parameters, **(given | server.options)
            )
            if server.scheduler:
                self.scheduler = make_scheduler(
                    server.scheduler, self.optimizer, **server.scheduler_options
                )
        except ValueError as error:
            raise ConfigError(f"server: {error}") from None

    def _make_links(self, config: Config) -> None:
        """Channels by kind of message: the update's and the model's, and the algorithm's."""
        up, down = config.uplink, config.downlink
        for key, link in (("uplink", up), ("downlink", down)):
            try:
                parse_values(link.values)
            except ValueError as error:
                raise ConfigError(f"{key}.values: {error}") from None

        def make(kind: str, selection: Selection, link: Any, unbiased: bool = False) -> Channel:
            def seed_for(purpose: str, *rest: int) -> int:
                return config.seed_for(f"{kind}/{purpose}", *rest)

            return Channel(self.layout, selection, link, unbiased, seed_for)

        self.uplinks = {"update": make("update", config.pruning, up, not up.error_feedback)}
        if self.algorithm.up:  # a sum that both ends keep: what is lost of it is never scaled up
            self.uplinks[self.algorithm.up] = make(self.algorithm.up, config.pruning, up)
        self.downlinks: dict[str, WholeModel | Changes] = {}
        for kind in filter(None, ("model", self.algorithm.down)):
            channel = make(kind, down.pruning, down)
            if down.mode == "model":
                self.downlinks[kind] = WholeModel(channel, kind)
            else:
                whole = make(kind, Selection(method="none"), Downlink(values="fp32"))
                self.downlinks[kind] = Changes(channel, whole, self._held(kind), kind)

    def _held(self, kind: str) -> Tensor:
        """What the server holds of the vectors that it broadcasts."""
        return self.parameters.detach() if kind == "model" else self.vector

    def broadcast(self, number: int, cohort: list[int]) -> Broadcast:
        """The messages that bring the model to each client, and what they decode to.

        In round 0, which only scores the weights, nothing else comes along.
        """
        messages, received = self.mask.messages(cohort), {}
        for kind, link in self.downlinks.items():
            if kind == "model" or number > 0:
                received[kind], sent = link.send(self._held(kind), number, cohort)
                messages = {client: [*some, *sent[client]] for client, some in messages.items()}
        buffers = self.buffers
        if self.sends_buffers:
            payload, sent = encode(buffers, self.buffer_layout)
            buffers, size = sent.dense(), self.buffer_layout.size
            message = Message("buffers", payload, size, size)
            messages = {client: [*some, message] for client, some in messages.items()}
        vector = received.get(self.algorithm.down)
        return Broadcast(received["model"], vector, buffers, messages)

    def receive(self, report: Report, number: int) -> dict[str, Decoded]:
        """Decode a client's payloads, by kind. Raises PayloadError."""
        layouts = {"buffers": self.buffer_layout, "scores": self.layout, "growth": self.layout}
        decoded = {
            kind: self.uplinks[kind].decode(payload, number, report.client)
            if kind in self.uplinks
            else decode(payload, layouts[kind])
            for kind, payload in report.payloads.items()
        }
        if "buffers" in decoded and (decoded["buffers"].dense()[self.is_variance] < 0).any():
            raise PayloadError("buffers: a running variance is negative")
        return decoded

    def step(self, reports: list[Report], number: int, add_up: AddUp = alone) -> list[int]:
        """Average the updates, in the order of the reports, and step; return who was averaged.

        A client that failed is left out, and so is one whose payload does not decode (its report
        then says so). If nobody is left, the model stays as it is. Raises ConfigError if the step
        makes the model inf or NaN. add_up: what other ranks decode, see Ranks.add_up().
        """
        averages, averaged, squared_norm = self._average(reports, number, add_up)
        if averaged:
            if self.mask.grows_in(number):
                self.growth = averages["growth"]
            weights = {r.client: self._weight(r) for r in reports if r.client in averaged}
            total = sum(weights.values())
            reach = sum(weights.get(r.client, 0) * r.reach for r in reports) / total
            self.algorithm.aggregate(averages, self.vector, total / self.total_weight, reach)
            if self.wants_norms:
                self.optimizer.param_groups[0]["mean_squared_norm"] = squared_norm
            self._apply(averages["update"], averages.get("buffers", self.buffers))
        return averaged

    def _weight(self, report: Report) -> int:
        return report.num_examples if self.by_examples else 1

    def commit(self, number: int, cohort: list[int]) -> None:
        """The round took place: its cohort has what it was sent, and now the mask may change."""
        for link in self.downlinks.values():
            link.commit()
        self.mask.received(cohort)
        if self.growth is not None:
            self.mask.regrow(self.parameters.detach(), self.growth, number)
            self.growth = None
            self._use_mask()

    def choose_mask(self, reports: list[Report], add_up: AddUp = alone) -> None:
        """Average the clients' SNIP scores, in the order of the reports, and prune the model."""
        averages, averaged, _ = self._average(reports, 0, add_up)
        if not averaged or not averages["scores"].any():
            raise ConfigError("pruning.mask: no client has finite scores; take another seed")
        self.prune(averages["scores"])

    def prune(self, scores: Tensor) -> None:
        """Keep the weights with the best SNIP scores, float32 [num_parameters]."""
        self.mask.choose(scores)
        self._use_mask()

    def _use_mask(self) -> None:
        """From now on the weights outside the mask are 0 and do not travel."""
        self.pruned = self.mask.pruned
        if self.pruned is not None:
            for link in (*self.uplinks.values(), *self.downlinks.values()):
                link.use_mask(self.mask.kept)
            self.parameters.data.masked_fill_(self.pruned, 0.0)
            if self.vector is not None:
                self.vector.masked_fill_(self.pruned, 0.0)

    def _average(
        self, reports: list[Report], number: int, add_up: AddUp
    ) -> tuple[dict[str, Tensor], list[int], float]:
        """The clients' vectors by kind, averaged in the order of the reports; whose they are; and
        the average of the updates' squared norms, for FedExP.

        One report is decoded at a time, so that a large cohort takes no memory.
        """
        weights = {r.client: self._weight(r) for r in reports if not r.failure}
        total, averages = sum(weights.values()), {}
        counters = torch.zeros_like(self.buffers)
        for report in reports:
            if report.failure or not report.payloads:
                continue
            try:
                decoded = self.receive(report, number)
            except PayloadError as error:
                report.failure = f"payload refused: {error}"
                continue
            if self.wants_norms and number > 0:
                square = np.square(decoded["update"].values, dtype=float).sum()
                decoded["squared_norm"] = Decoded(1, None, np.array([square], np.float32))
            for kind, part in decoded.items():
                if kind not in averages:
                    averages[kind] = torch.zeros(part.size)
                part.add_to(averages[kind], weights[report.client] / total)
            if "buffers" in decoded:
                counters = torch.maximum(counters, decoded["buffers"].dense())
        add_up(averages, counters, reports)
        averaged = [r.client for r in reports if not r.failure]
        if len(averaged) < len(weights):  # some were refused: the others weigh more
            for average in averages.values():
                average.mul_(total / max(1, sum(weights[client] for client in averaged)))
        if "buffers" in averages:
            averages["buffers"] = torch.where(self.is_counter, counters, averages["buffers"])
        squared_norm = averages.pop("squared_norm", torch.zeros(1))
        return averages, averaged, float(squared_norm)

    def _apply(self, update: Tensor, buffers: Tensor) -> None:
        self.buffers = buffers
        self.parameters.grad = update.neg_()
        self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()
        self.parameters.grad = None
        if self.pruned is not None:  # momentum from before a change of the mask moves nothing
            self.parameters.data.masked_fill_(self.pruned, 0.0)
        if not all_finite(self.parameters.data):
            raise ConfigError(
                "server: a step made the model inf or NaN; lower server.lr, or raise tau or eps"
            )

    def density(self) -> float:
        """The share of the parameters that are not 0."""
        return int(torch.count_nonzero(self.parameters.data)) / self.layout.size

    def sha256(self) -> str:
        """Of the parameters and then the buffers, as little-endian float32."""
        digest = hashlib.sha256(self.parameters.detach().numpy().astype("<f4", copy=False).data)
        digest.update(self.buffers.numpy().astype("<f4", copy=False).data)
        return digest.hexdigest()

    def state(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters.detach(),
            "buffers": self.buffers,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else {},
            "vector": self.vector,
            "mask": self.mask.state(),
            "downlinks": {kind: link.state() for kind, link in self.downlinks.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        self.mask.load(state["mask"])
        self._use_mask()
        self.parameters.data.copy_(state["parameters"])
        self.buffers.copy_(state["buffers"])
        if self.vector is not None:
            self.vector.copy_(state["vector"])
        for kind, link in self.downlinks.items():
            link.load(state["downlinks"][kind])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
