"""Who begins a synchronous round: a sampler chooses among the clients that are there.

docs/extending.md adds a new way.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from config import Config
from federation.cohort import cohort_size, sample_cohort
from federation.messages import Report


class Uniform:
    """Every client that is there is equally likely (McMahan et al. 2017, arXiv 1602.05629)."""

    def __init__(self, config: Config, seconds: Callable[[np.ndarray | int], np.ndarray]):
        """seconds: of each client's whole round, if it is alone and sends a dense update."""
        self.config, self.seconds, self.wanted = config, seconds, cohort_size(config)

    def choose(self, there: np.ndarray, round_number: int) -> list[int]:
        """The cohort of a round, ascending; there: int64 clients, ascending."""
        return sample_cohort(self.config, there, round_number)

    def observe(self, round_number: int, reports: list[Report], lasted: dict[int, float]) -> None:
        """How a round went; lasted: seconds of each client that was done in time."""

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain values."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass

    def _rng(self, round_number: int) -> np.random.Generator:
        return np.random.default_rng(self.config.seed_for("sampling", round_number))
