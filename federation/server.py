"""The server's part of a round: broadcast the model, decode and average updates, step.

Every rank holds this state and does these steps for itself, from the same bytes in the same order.
"""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pruning
from afo import forget, make_optimizer, make_scheduler
from compression import Decoded, PayloadError, all_finite
from config import Config, ConfigError
from federation.agreement import Agreement
from federation.downlink import Changes, Copies, DownlinkMode, WholeModel
from federation.mask import MaskHistory
from federation.messages import SERVER, Broadcast, Message, Report


class Average:
    """The weighted averages of a cohort's vectors by kind, summed as reports arrive.

    A report is decoded when it arrives and needs not be kept, so a large cohort takes no memory.
    weights: of the clients from whom reports are expected; is_counter: bool [num_buffers], on the
    device of the sums: of these the largest counts, and not the average; is_variance: the same on
    the CPU, and must not be negative; with_norms: average the updates' squared norms too.
    """

    def __init__(
        self,
        agreement: Agreement,
        weights: dict[int, int],
        is_counter: Tensor,
        is_variance: Tensor,
        with_norms: bool,
    ):
        self.agreement, self.weights, self.total = agreement, weights, sum(weights.values())
        self.is_counter, self.is_variance = is_counter, is_variance
        self.with_norms = with_norms
        self.sums: dict[str, Tensor] = {}
        self.counters = torch.zeros(len(is_counter), device=is_counter.device)
        self.reports: list[Report] = []

    def decode(self, report: Report, round_number: int) -> dict[str, Decoded]:
        """What a client sent, by kind, on the device of the sums; any thread may decode.

        A client whose payload does not decode fails, and the report says so. Of one that failed,
        or whose payloads are on another rank, nothing arrives.
        """
        if report.failure or any(message.payload is None for message in report.messages):
            return {}
        try:
            arrived = self._decode(report, round_number)
        except PayloadError as error:
            report.failure = f"payload refused: {error}"
            return {}
        if self.with_norms and "update" in arrived:
            square = np.square(arrived["update"].values, dtype=float).sum()
            arrived["squared_norm"] = Decoded(1, None, np.array([square], np.float32))
        return {kind: part.to(self.counters.device) for kind, part in arrived.items()}

    def add(self, report: Report, arrived: dict[str, Decoded], discount: float = 1.0) -> None:
        """Add what a client sent, as decode() returned it; a discount makes its update smaller.

        Its payloads are of no more use.
        """
        self.reports.append(report.without_payloads())
        for kind, part in arrived.items():
            if kind not in self.sums:
                self.sums[kind] = torch.zeros(part.size, device=self.counters.device)
            weight = self.weights[report.client] / max(self.total, 1)
            part.add_to(self.sums[kind], weight * discount if kind == "update" else weight)
        if "buffers" in arrived:
            self.counters = torch.maximum(self.counters, arrived["buffers"].dense())

    def finish(self) -> dict[str, Tensor]:
        """The averages over those who did not fail, by kind of message."""
        present = sum(self.weights[report.client] for report in self.averaged)
        if present < self.total:  # some failed or were refused: the others weigh more
            for vector in self.sums.values():
                vector.mul_(self.total / max(1, present))
        if "buffers" in self.sums:
            averages = self.sums["buffers"]
            self.sums["buffers"] = torch.where(self.is_counter, self.counters, averages)
        return self.sums

    @property
    def averaged(self) -> list[Report]:
        """The reports that count."""
        return [report for report in self.reports if not report.failure]

    def _decode(self, report: Report, round_number: int) -> dict[str, Decoded]:
        """A client's vectors by kind. Raises PayloadError."""
        arrived = {
            message.kind: self.agreement.channel("up", message.kind).decode(
                message.payload, round_number, report.client
            )
            for message in report.messages
        }
        if "buffers" in arrived and (arrived["buffers"].dense()[self.is_variance] < 0).any():
            raise PayloadError("buffers: a running variance is negative")
        return arrived


class Server:
    """The global vectors and the optimizer that steps them.

    parameters: float32 [num_parameters], stepped; vector: float32 [num_parameters], the client
    algorithm's, if it has one; buffers: float32 [num_buffers], averaged; is_counter, is_variance:
    bool [num_buffers]; num_examples: of each client. All vectors live where `parameters` is.
    Raises ConfigError for settings of the optimizer or the scheduler that it does not take.
    """

    def __init__(
        self,
        config: Config,
        agreement: Agreement,
        parameters: Tensor,
        buffers: Tensor,
        is_counter: Tensor,
        is_variance: Tensor,
        num_examples: list[int],
    ):
        self.agreement, self.mask, self.algorithm = agreement, agreement.mask, agreement.algorithm
        self.device = device = parameters.device
        self.parameters = torch.nn.Parameter(parameters.detach().clone())
        self.buffers = buffers.clone()
        self.is_counter, self.is_variance = is_counter.to(device), is_variance
        self.vector = torch.zeros_like(parameters) if self.algorithm.has_vector else None
        self.history = MaskHistory()
        self.growth: Tensor | None = None  # float32 [n]: average of what clients want to grow
        self.pruned = self._pruned()
        if self.pruned is not None:
            gains = pruning.sparse_gains(self.mask.kept, agreement.layout.shapes).to(device)
            self.parameters.data.mul_(gains).masked_fill_(self.pruned, 0.0)
        self.downlinks = self._make_downlinks(config)
        by_examples = config.server.weighting == "examples"
        self.weights = num_examples if by_examples else [1] * len(num_examples)
        self._make_optimizer(config)

    def _make_downlinks(self, config: Config) -> dict[str, DownlinkMode]:
        """How the model reaches the clients, and the algorithm's vector if it travels."""
        kinds = filter(None, ("model", self.algorithm.down))
        if config.downlink.mode == "model":
            return {kind: WholeModel(self.agreement, kind) for kind in kinds}
        link = Copies if config.downlink.mode == "copies" else Changes
        return {kind: link(self.agreement, self._held(kind), kind) for kind in kinds}

    def _held(self, kind: str) -> Tensor:
        """What the server holds of a vector that it broadcasts."""
        return self.parameters.detach() if kind == "model" else self.vector

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
        self.wants_norms = "mean_squared_norm" in self.optimizer.param_groups[0]

    # --- down -------------------------------------------------------------------------------------

    def broadcast(self, round_number: int, cohort: list[int]) -> Broadcast:
        """The messages that bring the model to each client, and what they decode to.

        In round 0, which only scores the weights, nothing else comes along, and a system without
        compression would send nothing.
        """
        messages, received = self._mask_messages(cohort), {}
        for kind, link in self.downlinks.items():
            if kind == "model" or round_number > 0:
                received[kind], sent = link.send(self._held(kind), round_number, cohort)
                messages = {client: [*some, *sent[client]] for client, some in messages.items()}
        buffers = self.buffers
        if self.agreement.sends_buffers:
            payload, sent = self.agreement.channel("down", "buffers").encode(buffers, round_number)
            buffers = sent.to(self.device).dense()
            for client, some in messages.items():
                some.append(self._message("buffers", client, payload, len(buffers)))
        if round_number == 0:
            messages = {c: [replace(m, dense_values=0) for m in ms] for c, ms in messages.items()}
        vector, bring = received.get(self.algorithm.down), None
        if round_number > 0:
            bring = self.downlinks["model"].to_each(self._held("model"), round_number)
        return Broadcast(received["model"], vector, buffers, self.mask.version, messages, bring)

    def _mask_messages(self, cohort: list[int]) -> dict[int, list[Message]]:
        """What each client lacks of the mask: nothing, the last change, or the whole mask."""
        missed = self.history.missed(cohort, self.mask.version)
        if not any(missed.values()):
            return {client: [] for client in cohort}
        positions = {"mask": self.mask.kept, "mask_change": self.history.last_change}
        payloads = {
            kind: self.agreement.channel("down", kind).encode(some)
            for kind, some in positions.items()
        }
        shorter = min(payloads, key=lambda kind: len(payloads[kind]))
        messages: dict[int, list[Message]] = {}
        for client, changes in missed.items():
            kind = "mask" if changes > 1 else shorter
            message = self._message(kind, client, payloads[kind], len(positions[kind]))
            messages[client] = [message] if changes else []
        return messages

    def _message(self, kind: str, client: int, payload: memoryview, num_values: int) -> Message:
        return self.agreement.message("down", kind, SERVER, client, payload, num_values)

    # --- up ---------------------------------------------------------------------------------------

    def new_average(self, cohort: list[int]) -> Average:
        """An empty average, to which the cohort's reports are added in client order."""
        weights = {client: self.weights[client] for client in cohort}
        marks = self.is_counter, self.is_variance
        return Average(self.agreement, weights, *marks, with_norms=self.wants_norms)

    def step(self, average: Average, round_number: int) -> list[int]:
        """Step by the averaged updates; return the clients that were averaged.

        If nobody is left, the model stays as it is. Raises ConfigError if the step makes the model
        inf or NaN.
        """
        averages, reports = average.finish(), average.averaged
        for link in self.downlinks.values():
            link.observe(average.reports, round_number)
        if reports:
            if self.mask.grows_in(round_number):
                self.growth = averages["growth"]
            weights = average.weights
            total = sum(weights[report.client] for report in reports)
            weighted = sum(weights[report.client] * report.step_length for report in reports)
            share = total / sum(self.weights)
            self.algorithm.aggregate(averages, self.vector, share, weighted / max(total, 1))
            if self.wants_norms:
                norm = float(averages["squared_norm"])
                self.optimizer.param_groups[0]["mean_squared_norm"] = norm
            self._apply(averages["update"], averages.get("buffers", self.buffers))
        return [report.client for report in reports]

    def _apply(self, update: Tensor, buffers: Tensor) -> None:
        self.buffers = buffers
        if self.pruned is not None:  # where FedDyn's vector would go on to move weights
            update.masked_fill_(self.pruned, 0.0)
        self.parameters.grad = update.neg_()
        self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()
        self.parameters.grad = None
        if self.pruned is not None:  # an optimizer may move what has no gradient: weight decay
            self.parameters.data.masked_fill_(self.pruned, 0.0)
        if not all_finite(self.parameters.data):
            raise ConfigError(
                "server: a step made the model inf or NaN; lower server.lr, or raise tau or eps"
            )

    def commit(self, round_number: int, received: list[int]) -> None:
        """The round took place, and now the mask may change.

        received: the clients that have what they were sent. Of one that was cut off nobody knows.
        """
        for link in self.downlinks.values():
            link.commit(received)
        self.history.record_received(received, self.mask.version)
        if self.growth is not None:
            growth, self.growth = self.growth.cpu(), None
            weights = self.parameters.detach().cpu()
            self._use_mask(self.mask.regrown(weights, growth, round_number))

    # --- the mask ---------------------------------------------------------------------------------

    def choose_mask(self, average: Average) -> None:
        """Prune the model by the clients' averaged SNIP scores. Raises ConfigError without any."""
        averages = average.finish()
        if not average.averaged or not averages["scores"].any():
            raise ConfigError("pruning.mask: no client has finite scores; take another seed")
        self.prune(averages["scores"])

    def prune(self, scores: Tensor) -> None:
        """Keep the weights with the best SNIP scores, float32 [num_parameters]."""
        density, shapes = self.mask.settings.density, self.agreement.layout.shapes
        self._use_mask(pruning.keep_mask(scores.cpu(), density, shapes))

    def _use_mask(self, kept: np.ndarray) -> None:
        """From now on only these weights exist: all who hold a vector over them are told.

        The algorithm's vector stays as it is, and so does what the clients keep for theirs. If both
        ends forgot, SCAFFOLD's c would no longer be the mean of the c_i, since a client that was
        away cannot know which weights left and came back.
        """
        before = self.mask.positions()
        left = torch.from_numpy(self.agreement.use_mask(kept)).to(self.device)
        self.history.record_change(before, kept)
        self.pruned = self._pruned()
        for kind, link in self.downlinks.items():
            link.forget(left if kind == "model" else left[:0])
        forget(self.optimizer, left)
        self.parameters.data.index_fill_(0, left, 0.0)

    def _pruned(self) -> Tensor | None:
        """Which weights do not exist, bool [num_parameters]; None means that all of them do."""
        pruned = self.mask.pruned
        return None if pruned is None else pruned.to(self.device)

    # --- state ------------------------------------------------------------------------------------

    def density(self) -> float:
        """The share of the parameters that are not 0."""
        return int(torch.count_nonzero(self.parameters.data)) / len(self.parameters)

    def sha256(self) -> str:
        """Of the parameters and then the buffers, as little-endian float32."""
        digest = hashlib.sha256()
        for vector in (self.parameters.detach(), self.buffers):
            digest.update(vector.cpu().numpy().astype("<f4", copy=False).data)
        return digest.hexdigest()

    def state(self) -> dict[str, Any]:
        """For a checkpoint: tensors and plain values."""
        return {
            "parameters": self.parameters.detach(),
            "buffers": self.buffers,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else {},
            "vector": self.vector,
            "mask": self.mask.state(),
            "mask_history": self.history.state(),
            "downlinks": {kind: link.state() for kind, link in self.downlinks.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        self.agreement.load_mask(state["mask"])
        self.pruned = self._pruned()
        self.history.load(state["mask_history"])
        self.parameters.data.copy_(state["parameters"])
        self.buffers.copy_(state["buffers"])
        if self.vector is not None:
            self.vector.copy_(state["vector"])
        for kind, link in self.downlinks.items():
            link.load(state["downlinks"][kind])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
