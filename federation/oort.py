"""Oort: clients that are likely to teach the model much, and soon, come first.

Lai et al. 2021, "Oort: efficient federated learning via guided participant selection" (OSDI), arXiv
2010.06081, Algorithm 1.
"""

import math

import numpy as np

from federation.sampling import Uniform

EXPLORATION, DECAY, LEAST = 0.9, 0.98, 0.2  # epsilon: at first, by round, at last
CONFIDENCE = 0.1  # of a client's age, under the root of the uncertainty
CUT_OFF = 0.95  # clients above this share of the last exploited one's utility may be drawn
PENALTY = 2.0  # alpha: the exponent for clients that are too slow
PREFERRED = 0.5  # the preferred duration T is this quantile of the explored clients' seconds


class Oort(Uniform):
    """A share of a cohort is drawn by utility among explored clients, the rest among the others.

    Utility is num_examples * mean loss, where the paper has the root of the mean squared loss of
    the examples: a client reports one loss. T stays a quantile of the durations; the paper's pacer
    lengthens it when utilities fall. Clients with too high a loss are not removed, either.
    """

    def __init__(self, config, seconds):
        super().__init__(config, seconds)
        self.utility: dict[int, float] = {}  # statistical, by explored client
        self.last: dict[int, int] = {}  # the round in which it last took part
        self.lasted: dict[int, float] = {}  # seconds

    def choose(self, there, round_number):
        rng, wanted = self._rng(round_number), min(self.wanted, len(there))
        is_explored = np.isin(there, list(self.utility))
        explored, others = there[is_explored].tolist(), there[~is_explored]
        epsilon = max(LEAST, EXPLORATION * DECAY ** (round_number - 1))
        num_new = max(min(len(others), round(epsilon * wanted)), wanted - len(explored))
        chosen = self._exploit(explored, wanted - num_new, round_number, rng)
        # Faster clients are explored sooner.
        speeds = 1 / self.seconds(others)
        new = rng.choice(others, num_new, replace=False, p=speeds / speeds.sum()) if num_new else []
        return sorted([*chosen, *map(int, new)])

    def _exploit(self, explored, count, round_number, rng) -> list[int]:
        """So many explored clients, drawn by utility among the best."""
        if not count:
            return []
        preferred = float(np.quantile(list(self.lasted.values()), PREFERRED))
        utilities = np.array([self._of(client, round_number, preferred) for client in explored])
        cut = CUT_OFF * np.sort(utilities)[-count]
        best = [(c, u) for c, u in zip(explored, utilities, strict=True) if u >= cut]
        clients, weights = zip(*best, strict=True)
        share = np.array(weights) / sum(weights)
        return [int(client) for client in rng.choice(clients, count, replace=False, p=share)]

    def _of(self, client: int, round_number: int, preferred: float) -> float:
        """Statistical utility, with uncertainty by age, less where the client is too slow."""
        age = self.last[client]
        utility = self.utility[client] + math.sqrt(CONFIDENCE * math.log(round_number) / age)
        slow = self.lasted[client] > preferred
        return utility * (preferred / self.lasted[client]) ** PENALTY if slow else utility

    def observe(self, round_number, reports, lasted):
        for report in reports:
            if report.failure and not report.is_late:
                continue
            self.utility[report.client] = report.num_examples * max(report.loss, 1e-9)
            self.last[report.client] = round_number
            seconds = lasted.get(report.client, float(self.seconds(report.client)))
            self.lasted[report.client] = max(seconds, 1e-9)

    def state(self):
        return {"utility": self.utility, "last": self.last, "lasted": self.lasted}

    def load(self, state):
        self.utility, self.last, self.lasted = (state[k] for k in ("utility", "last", "lasted"))
