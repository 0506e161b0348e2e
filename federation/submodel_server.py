"""The server of clients with networks of several widths: slices go down, and slices come up.

HeteroFL (Diao et al. 2021, arXiv 2010.01264, section 3). Each width has a link of its own over its
slice of the server's vector. What comes up is averaged count-wise: a coordinate moves by the
weighted mean over the clients that have it.
"""

from typing import Any

import torch
from torch import Tensor

from compression import Decoded
from config import Config
from federation.downlink import Changes, Copies, DownlinkMode, WholeModel
from federation.messages import Broadcast, Report
from federation.server import Average, Server
from federation.slices import ShareOf, Slice, SliceBroadcast


class CountedAverage:
    """Count-wise averages, summed as reports arrive: an Average for each share of the channels.

    weights: of the clients from whom reports are expected; averages: by share, the widest first.
    """

    def __init__(
        self,
        weights: dict[int, int],
        averages: dict[float, Average],
        slices: dict[float, Slice],
        share_of: ShareOf,
    ):
        self.weights, self.averages = weights, averages
        self.slices, self.share_of = slices, share_of
        self.reports: list[Report] = []

    def decode(self, report: Report, round_number: int) -> dict[str, Decoded]:
        """What a client sent, by kind, in the coordinates of its own network."""
        return self._of(report).decode(report, round_number)

    def add(self, report: Report, arrived: dict[str, Decoded], discount: float = 1.0) -> None:
        """Add what decode() returned; a discount makes an update smaller."""
        self.reports.append(report.without_payloads())
        self._of(report).add(report, arrived, discount)

    def finish(self) -> dict[str, Tensor]:
        """The averages by kind of message: of updates count-wise, of other kinds over all."""
        weights = self._weights()
        if not weights:
            return {}
        parts = {share: self.averages[share].finish() for share in weights}
        if list(weights) == [1.0]:
            return parts[1.0]
        update = torch.zeros(self.size, device=next(iter(parts.values()))["update"].device)
        count = torch.zeros_like(update)
        for share, weight in weights.items():
            piece = self.slices[share]
            piece.add_to(update, parts[share]["update"], weight)
            piece.add_to(count, torch.ones_like(parts[share]["update"]), weight)
        averages = {"update": update.div_(count.clamp_(min=min(weights.values())))}
        for kind in next(iter(parts.values())).keys() - {"update"}:
            terms = [parts[share][kind] * weight for share, weight in weights.items()]
            averages[kind] = sum(terms) / sum(weights.values())
        return averages

    def outside(self) -> Tensor | None:
        """Where no client of the average has a weight, bool [size]; None if there is no such place.

        Narrower slices lie within wider ones, so the widest one decides.
        """
        widest = max(self._weights(), default=None)
        return None if widest is None else self.slices[widest].outside(self.size)

    @property
    def averaged(self) -> list[Report]:
        """The reports that count."""
        return [report for report in self.reports if not report.failure]

    @property
    def size(self) -> int:
        """How many coordinates the whole network has."""
        return self.slices[1.0].agreement.layout.size

    def _of(self, report: Report) -> Average:
        return self.averages[self.share_of(report.client)]

    def _weights(self) -> dict[float, int]:
        """The weights of the clients that count, summed by share; the widest first."""
        weights = dict.fromkeys(self.averages, 0)
        for report in self.averaged:
            weights[self.share_of(report.client)] += self.weights[report.client]
        return {share: weight for share, weight in weights.items() if weight}


class SubmodelServer(Server):
    """The global vector and the optimizer that steps it.

    slices: by share of the channels, the widest first, which is the whole network.
    """

    def __init__(self, config: Config, slices: dict[float, Slice], share_of: ShareOf, *rest: Any):
        self.slices, self.share_of = slices, share_of
        self.sends_changes = config.downlink.mode == "change"  # which have to follow each other
        super().__init__(config, slices[1.0].agreement, *rest)

    def _make_downlinks(self, config: Config) -> dict[float, DownlinkMode]:
        if config.downlink.mode == "model":
            return {share: WholeModel(piece.agreement) for share, piece in self.slices.items()}
        link, whole = Copies if config.downlink.mode == "copies" else Changes, self.parameters
        return {
            share: link(piece.agreement, piece.cut(whole.detach()))
            for share, piece in self.slices.items()
        }

    def broadcast(self, round_number: int, cohort: list[int]) -> SliceBroadcast:
        """The messages that bring each client its slice, and what they decode to."""
        by_share = {}
        for share, piece in self.slices.items():
            members = [client for client in cohort if self.share_of(client) == share]
            if not members and not self.sends_changes:
                continue
            vector = piece.cut(self.parameters.detach())
            link = self.downlinks[share]
            received, messages = link.send(vector, round_number, members)
            bring = link.to_each(vector, round_number)
            by_share[share] = Broadcast(received, None, self.buffers, 0, messages, bring)
        return SliceBroadcast(by_share, self.share_of)

    def new_average(self, cohort: list[int]) -> CountedAverage:
        """An empty average, to which the cohort's reports are added in client order."""
        averages = {}
        for share, piece in self.slices.items():
            weights = {c: self.weights[c] for c in cohort if self.share_of(c) == share}
            marks = self.is_counter, self.is_variance
            averages[share] = Average(piece.agreement, weights, *marks, self.wants_norms)
        weights = {client: self.weights[client] for client in cohort}
        return CountedAverage(weights, averages, self.slices, self.share_of)

    def step(self, average: CountedAverage, round_number: int) -> list[int]:
        """Step as a Server does; a weight that no averaged client has stays as it is.

        The optimizer's momentum would move it otherwise.
        """
        outside = average.outside()
        before = None if outside is None else self.parameters.detach()[outside]
        averaged = super().step(average, round_number)
        if outside is not None:
            self.parameters.data[outside] = before
        return averaged
