"""downlink.budget: how large what a client lacks must be to travel, so that a run's bytes suffice.

One limit for all clients of a round spends bytes on those that lack most: newcomers, and clients
that were away for long. How much will be lacking nobody knows beforehand, so the limit follows what
was spent.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compression import OVERHEAD
from config import ConfigError
from federation.agreement import Agreement
from federation.budget import ratio_of
from federation.cohort import cohort_size
from federation.ledger import BYTES_PER_VALUE
from training.local_sgd import local_lr

BYTES_PER_COORDINATE = 1  # about what a position and its value take
GAIN = 0.5  # a fifth less of a limit is a fifth to two fifths more bytes: this does not overshoot


class Allowance:
    """The bytes that are left of a run's, and the limit.

    left: bytes; shares: of each round, float64 [rounds]. A model moves about as far as its clients'
    learning rate is large, and so rounds get bytes in proportion to its square root.
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
        self.left, self.limit = messages * (room - besides), math.inf
        rounds = range(1, config.rounds + 1)
        rates = [local_lr(config.local, number, config.rounds) for number in rounds]
        self.shares, self.cohort = np.sqrt(rates), cohort_size(config)

    def of_round(self, round_number: int) -> float:
        """The bytes that a round should take."""
        shares = self.shares[round_number - 1 :]
        return self.left * shares[0] / max(shares.sum(), np.finfo(float).tiny)

    def begin(self, lacks: Tensor, round_number: int) -> None:
        """The first limit, by what a newcomer lacks, float32 [n]; inf until it lacks anything."""
        moved = int(torch.count_nonzero(lacks)) if math.isinf(self.limit) else 0
        if moved:
            wanted = self.of_round(round_number) / self.cohort / BYTES_PER_COORDINATE
            k = min(max(1, int(wanted)), moved)
            self.limit = float(torch.topk(lacks.abs(), k).values[-1])

    def spend(self, num_bytes: int, round_number: int) -> None:
        """A round's messages had so many bytes."""
        wanted = self.of_round(round_number)
        self.left = max(0.0, self.left - num_bytes)
        self.limit *= min(2.0, max(0.5, (num_bytes / wanted) ** GAIN)) if wanted else 2.0

    def state(self) -> dict[str, Any]:
        return {"left": self.left, "limit": self.limit}

    def load(self, state: dict[str, Any]) -> None:
        self.left, self.limit = state["left"], state["limit"]
