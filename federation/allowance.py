"""downlink.budget: how large what a client lacks must be to travel, so that a run's bytes suffice.

One limit for all clients of a round spends bytes on those that lack most: newcomers, and clients
that were away for long. How much will be lacking nobody knows beforehand, so the limit follows what
was spent.
"""

import math
from typing import Any

import torch
from torch import Tensor

from compression import OVERHEAD
from config import ConfigError
from federation.agreement import Agreement
from federation.budget import ratio_of
from federation.cohort import cohort_size
from federation.ledger import BYTES_PER_VALUE

BYTES_PER_COORDINATE = 1  # about what a position and its value take
GAIN = 0.2  # of the way, on a scale of logarithms: a limit that follows faster swings


class Allowance:
    """The bytes that are left of a run's, and the limit above which a coordinate travels.

    All rounds have an equal share of what is left. Bytes that follow the clients' learning rate
    help early, and then models fall behind at the end, when clients cannot follow the last steps.
    over: how many times its share the round before has spent.
    """

    def __init__(self, agreement: Agreement):
        config = agreement.config
        messages = cohort_size(config) * config.rounds
        num_buffers = agreement.buffer_layout.size if agreement.sends_buffers else 0
        dense = BYTES_PER_VALUE * (agreement.layout.size + num_buffers)
        besides = (OVERHEAD + BYTES_PER_VALUE * num_buffers) if num_buffers else 0
        room = dense / ratio_of(config.downlink.budget)
        if room < besides + 2 * OVERHEAD:
            raise ConfigError(
                f"downlink.budget: {config.downlink.budget} leaves {room:,.0f} bytes a message; "
                "set a smaller number" + (", or model.norm_policy=static" if num_buffers else "")
            )
        self.left, self.limit, self.over = messages * (room - besides), math.inf, 1.0
        self.first_rounds = config.clients.total / cohort_size(config)
        self.rounds, self.cohort = config.rounds, cohort_size(config)

    def of_round(self, round_number: int) -> float:
        """The bytes that a round should take."""
        return self.left / (self.rounds + 1 - round_number)

    def limit_of(self, lacks: Tensor, round_number: int) -> float:
        """The limit of a round; lacks: float32 [n], what a newcomer lacks.

        As long as most clients are newcomers, it is as many of these entries as the round can pay
        for. If too much was spent then, the limit becomes the magnitude that fewer of these entries
        have: they tell what a change of the limit is worth.
        """
        magnitudes = lacks.abs()
        moved = int(torch.count_nonzero(magnitudes))
        if not moved:
            return self.limit
        if math.isinf(self.limit) or round_number < self.first_rounds:
            wanted = self.of_round(round_number) / self.cohort / BYTES_PER_COORDINATE
        else:
            wanted = int((magnitudes > self.limit).sum()) / self.over**GAIN
        k = min(max(1, int(wanted)), moved)
        return float(magnitudes.topk(k, sorted=False).values.min())

    def spend(self, num_bytes: int, limit: float, round_number: int) -> None:
        """The round took place: with this limit its messages had so many bytes."""
        self.limit = limit
        self.over = num_bytes / max(1.0, self.of_round(round_number))
        self.left = max(0.0, self.left - num_bytes)

    def state(self) -> dict[str, Any]:
        return {"left": self.left, "limit": self.limit, "over": self.over}

    def load(self, state: dict[str, Any]) -> None:
        self.left, self.limit, self.over = (state[key] for key in ("left", "limit", "over"))
