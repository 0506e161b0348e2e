"""The server's part of a round: broadcast the model, decode and average updates, step.

Every rank holds this state and does these steps for itself, from the same bytes in the same order.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pruning
from afo import make_optimizer, make_scheduler
from channel import Channel
from cnn_model import FlatModel
from compression import Decoded, all_finite, decode, encode
from config import Config, ConfigError, Downlink, Selection
from distributed import Report
from downlink import Changes, Message, WholeModel
from masks import SharedMask
from quantisers import parse_values
from wire import PayloadError


@dataclass(frozen=True)
class Broadcast:
    """What the clients decode, float32 [n] each, and the messages that it came in."""

    parameters: Tensor
    buffers: Tensor
    messages: dict[int, list[Message]]  # by client


class Server:
    """The global vectors and the optimizer that steps them.

    parameters: float32 [num_parameters], stepped; buffers: float32 [num_buffers], averaged.
    """

    def __init__(self, config: Config, model: FlatModel):
        self.layout, self.buffer_layout = model.layout, model.buffer_layout
        self.parameters = torch.nn.Parameter(model.parameters.detach().cpu().clone())
        self.buffers = model.buffers.cpu().clone()
        self.is_counter = model.is_counter
        seed = config.seed_for("mask")
        self.mask = SharedMask(config.pruning.mask, self.layout, config.rounds, seed)
        if self.mask.kept is not None:
            self.parameters.data.mul_(pruning.sparse_gains(self.mask.kept, self.layout.shapes))
        self.uplink, self.downlink = self._make_links(config)
        self.growth: Tensor | None = None  # float32 [n]: the average of the growth payloads
        self._use_mask()
        self.weighting = config.server.weighting
        self._make_optimizer(config)

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

    def _make_links(self, config: Config) -> tuple[Channel, WholeModel | Changes]:
        up, down = config.uplink, config.downlink
        for key, link in (("uplink", up), ("downlink", down)):
            try:
                parse_values(link.values)
            except ValueError as error:
                raise ConfigError(f"{key}.values: {error}") from None
        make = partial(Channel, self.layout, seed_for=config.seed_for)
        uplink = make(config.pruning, up, unbiased=not up.error_feedback)
        channel = make(down.pruning, down, unbiased=False)
        if down.mode == "model":
            return uplink, WholeModel(channel)
        whole = make(Selection(method="none"), Downlink(values="fp32"), unbiased=False)
        return uplink, Changes(channel, whole, self.parameters.detach())

    def broadcast(self, number: int, cohort: list[int]) -> Broadcast:
        """The messages that bring the model to each client, and what they decode to."""
        parameters, messages = self.downlink.send(self.parameters.detach(), number, cohort)
        buffers = self.buffers
        if self.buffer_layout.size:
            payload, sent = encode(buffers, self.buffer_layout)
            buffers, size = sent.dense(), self.buffer_layout.size
            message = Message("buffers", payload, size, size)
            messages = {client: [*some, message] for client, some in messages.items()}
        masks = self.mask.messages(cohort)
        messages = {client: [*masks[client], *some] for client, some in messages.items()}
        return Broadcast(parameters, buffers, messages)

    def receive(self, report: Report, number: int) -> dict[str, Decoded]:
        """Decode a client's payloads, by kind. Raises PayloadError."""
        layouts = {"buffers": self.buffer_layout, "scores": self.layout, "growth": self.layout}
        return {
            kind: self.uplink.decode(payload, number, report.client)
            if kind == "update"
            else decode(payload, layouts[kind])
            for kind, payload in report.payloads.items()
        }

    def step(self, reports: list[Report], number: int) -> list[int]:
        """Average the updates, in the order of the reports, and step; return who was averaged.

        A client that failed is left out, and so is one whose payload does not decode (its report
        then says so). If nobody is left, the model stays as it is. Raises ConfigError if the step
        makes the model inf or NaN.
        """
        averages, averaged = self._average(reports, number)
        if averaged:
            if self.mask.grows_in(number):
                self.growth = averages["growth"]
            self._apply(averages["update"], averages.get("buffers", self.buffers))
        return averaged

    def commit(self, number: int, cohort: list[int]) -> None:
        """The round took place: its cohort has what it was sent, and now the mask may change."""
        self.downlink.commit()
        self.mask.received(cohort)
        if self.growth is not None:
            self.mask.regrow(self.parameters.detach(), self.growth, number)
            self.growth = None
            self._use_mask()

    def choose_mask(self, reports: list[Report]) -> None:
        """Average the clients' SNIP scores, in the order of the reports, and prune the model."""
        averages, averaged = self._average(reports, 0)
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
            self.uplink.use_mask(self.mask.kept)
            self.downlink.use_mask(self.mask.kept)
            self.parameters.data.masked_fill_(self.pruned, 0.0)

    def _average(self, reports: list[Report], number: int) -> tuple[dict[str, Tensor], list[int]]:
        """The clients' vectors by kind, averaged in the order of the reports; and whose they are.

        One report is decoded at a time, so that a large cohort takes no memory.
        """
        by_examples = self.weighting == "examples"
        weights = {r.client: r.num_examples if by_examples else 1 for r in reports if not r.failure}
        total, averaged, averages = sum(weights.values()), [], {}
        counters = torch.zeros_like(self.buffers)
        for report in reports:
            if report.failure:
                continue
            try:
                decoded = self.receive(report, number)
            except PayloadError as error:
                report.failure = f"payload refused: {error}"
                continue
            averaged.append(report.client)
            for kind, part in decoded.items():
                if kind not in averages:
                    averages[kind] = torch.zeros(part.size)
                part.add_to(averages[kind], weights[report.client] / total)
            if "buffers" in decoded:
                counters = torch.maximum(counters, decoded["buffers"].dense())
        if len(averaged) < len(weights):  # some were refused: the others weigh more
            for average in averages.values():
                average.mul_(total / sum(weights[client] for client in averaged))
        if "buffers" in averages:
            averages["buffers"] = torch.where(self.is_counter, counters, averages["buffers"])
        return averages, averaged

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
            "mask": self.mask.state(),
            "downlink": self.downlink.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.mask.load(state["mask"])
        self._use_mask()
        self.parameters.data.copy_(state["parameters"])
        self.buffers.copy_(state["buffers"])
        self.downlink.load(state["downlink"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
