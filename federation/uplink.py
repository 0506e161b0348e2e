"""The clients' way up: prune, encode, and remember what does not travel.

It works on any thread, and for a client that it has never met: what it needs is in a LocalUpdate.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from algorithms import LocalRound
from compression import Decoded, Memory, NotFinite, all_finite, new_memory, to_host
from config import Config
from federation.agreement import Agreement
from federation.channel import Select, error_feedback
from federation.client_store import OWED, ClientStore, State
from federation.messages import SERVER, Broadcast, Buffer, Report

PIECE = 1 << 18  # values whose squares are added up in float32


@dataclass
class LocalUpdate:
    """What a client has learned, on the device of training, before any of it is encoded."""

    report: Report
    state: State = field(default_factory=dict)  # what the client kept before the round
    update: Tensor | None = None  # float32 [num_parameters]; None if there is nothing to send
    besides: Tensor | None = None  # float32 [num_parameters]: what the algorithm sends besides
    buffers: Tensor | None = None  # float32 [num_buffers]: None if they stay
    growth: Tensor | None = None  # float32 [num_parameters]: gradient that asks for weights
    optimizer: State = field(default_factory=dict)  # what its optimizer keeps, if anything
    norm: Tensor | None = None  # FedBN: weights of the client's norm layers, then the buffers
    algorithm: LocalRound = field(default_factory=LocalRound)
    lr: float = 0.0
    broadcast: Broadcast | None = None  # what it received
    received: Tensor | None = None  # float32 [num_parameters]: the weights that it began with
    known: State = field(default_factory=dict)  # the part of the state that its team has, too
    loss: Tensor | float = 0.0  # mean over the batches
    is_described: bool = False  # whether the report shall say what the update's bytes are


class Uplink:
    """Encodes what the clients of this rank have learned; stages in `store` what they keep."""

    def __init__(self, config: Config, agreement: Agreement, store: ClientStore):
        self.agreement, self.mask, self.store = agreement, agreement.mask, store
        self.sent: dict[int, Buffer] = {}  # by client: its update as it left, until owe_refused()
        self.feedback = error_feedback(config)
        self.keeps_copies = config.downlink.mode == "copies"

    def encode(
        self, trained: LocalUpdate, round_number: int, memory: Memory = new_memory
    ) -> Report:
        """Prune and encode what a client learned and still owes; stage what it keeps.

        memory: gives the bytes that payloads are written on.
        """
        report = trained.report
        if trained.update is None:
            return report
        report.loss = float(trained.loss)
        try:
            if trained.buffers is not None:
                self._add(report, "buffers", trained.buffers, round_number, memory)
            if trained.growth is not None:
                growth = to_host(trained.growth)
                candidates = self.mask.growth_candidates(growth, round_number)
                self._add(report, "growth", growth, round_number, memory, lambda *_: candidates)
            self._encode_update(trained, round_number, memory)
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
            channel, residual = self.agreement.channel("up", "update"), state["residual"]
            channel.decode(sent, round_number, client).to(residual.device).add_to(residual)
        self.store.stage(client, state, round_number)

    def owe_lost(self, client: int, sent: Buffer, sent_in: int, round_number: int) -> None:
        """An update of this round or of an earlier one never arrived: it is owed again."""
        is_staged = client in self.store.staged
        state = self.store.get_staged(client) if is_staged else self.store.get(client)
        if not self.feedback or "residual" not in state:
            return
        residual = state["residual"].clone()
        decoded = self.agreement.channel("up", "update").decode(sent, sent_in, client)
        decoded.to(residual.device).add_to(residual)
        self.store.stage(client, state | {"residual": residual}, round_number)

    def encode_scores(
        self, report: Report, scores: Tensor | None, memory: Memory = new_memory
    ) -> Report:
        """Encode the scores, if there are any."""
        try:
            if scores is not None:
                self._add(report, "scores", scores, 0, memory)
        except NotFinite:
            report.fail("the scores are not finite")
        return report

    def _encode_update(self, trained: LocalUpdate, round_number: int, memory: Memory) -> None:
        """Encode the update and what is owed; stage what does not travel for the next round."""
        report, state, kept = trained.report, trained.state, State()
        update = trained.update
        after = self.feedback.add(update, state) if self.feedback else {}
        arrived = {"update": self._add(report, "update", update, round_number, memory)}
        if trained.is_described:
            self.agreement.channel("up", "update").describe(report, round_number)
        if self.feedback:
            kept |= self.feedback.subtract(update, arrived["update"].to(update.device), after)
            self.sent[report.client] = report.messages[-1].payload
            report.residual_norm = _norm(kept["residual"])
        if trained.besides is not None:
            kind = self.agreement.algorithm.up
            arrived[kind] = self._add(report, kind, trained.besides, round_number, memory)
        if trained.algorithm.keeps:
            before = state.get("algorithm")
            before = None if before is None else before.to(update.device)
            arrived = {kind: part.to(update.device) for kind, part in arrived.items()}
            algorithm = trained.algorithm.after_sending(before, arrived)
            kept |= {} if algorithm is None else State(algorithm=algorithm)
        if trained.norm is not None:
            kept["norm"] = trained.norm
        if self.keeps_copies:  # that the server has its update tells that it has received it
            kept["copy"] = trained.broadcast.parameters
        kept |= trained.optimizer
        if not all(map(all_finite, kept.values())):
            raise NotFinite
        if kept:
            self.store.stage(report.client, kept, round_number)

    def _add(
        self,
        report: Report,
        kind: str,
        vector: Tensor,
        round_number: int,
        memory: Memory,
        select: Select | None = None,
    ) -> Decoded:
        """Encode a vector into a message of the report; return what arrives. Raises NotFinite."""
        channel, client = self.agreement.channel("up", kind), report.client
        payload, arrived = channel.encode(vector, round_number, client, memory, select)
        report.messages.append(
            self.agreement.message("up", kind, client, SERVER, payload, len(arrived.values))
        )
        return arrived


def _norm(vector: Tensor) -> float:
    """The L2 norm, from the norms of pieces: one sum in float32 of ten million squares is off."""
    norms = [torch.linalg.vector_norm(piece) for piece in vector.split(PIECE)]
    return float(torch.linalg.vector_norm(torch.stack(norms)))
