"""Who takes part in a round, and which ranks train whom."""

import math

import numpy as np

from config import Config
from distributed import Ranks, place
from federation.client_store import ClientStore


def sample(candidates: np.ndarray, wanted: int, seed: int) -> list[int]:
    """So many different candidates, ascending, or all of them if there are fewer.

    candidates: clients that are there and have examples, ascending; the others could only fail.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(candidates), min(wanted, len(candidates)), replace=False)
    return candidates[np.sort(chosen)].tolist()


def sample_cohort(config: Config, candidates: np.ndarray, round_number: int) -> list[int]:
    """The clients that begin a synchronous round, see sample()."""
    return sample(candidates, cohort_size(config), config.seed_for("cohort", round_number))


def cohort_size(config: Config) -> int:
    """How many begin a round: clients.per_round or, with over-selection, more."""
    return math.ceil(config.clients.per_round * config.schedule.over_selection)


class Placement:
    """Which team of ranks trains which client; a client's state follows it by way of the disk.

    team_of: the team whose leader holds a client's state, of all clients that have one. A client
    without a state may be asked for, too: after a resume, one that is under way.
    """

    def __init__(self, ranks: Ranks, clients_with_state: list[int]):
        self.ranks = ranks
        self.team_of = {client: client % ranks.num_teams for client in clients_with_state}

    def is_here(self, client: int) -> bool:
        """Whether this rank belongs to the client's team."""
        return self.team_of.get(client, client % self.ranks.num_teams) == self.ranks.team.index

    def holds_state(self, client: int) -> bool:
        """Whether this rank is the one that keeps the client's state."""
        return self.is_here(client) and self.ranks.team.is_leader

    def place(self, costs: dict[int, float], store: ClientStore) -> None:
        """Place the cohort's clients, by the costs of training them, and move their states."""
        placed = place(costs, self.ranks.num_teams, self.team_of)
        here = self.ranks.team.index
        leaving = [c for c in costs if c in store.versions and placed[c] != here]
        released = {client: store.release(client) for client in leaving}
        self.team_of |= placed
        if self.ranks.size > 1:
            for moved in self.ranks.gather_json(released):
                for client, (version, changed) in moved.items():
                    if self.holds_state(int(client)):
                        store.adopt(int(client), version, changed)
