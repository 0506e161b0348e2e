"""cohort.py: who takes part is drawn from the seed, and a state is where its client is trained."""

from collections import Counter

import numpy as np
import pytest
import torch
from helpers.ranks import on_ranks

from config import Clients, Config
from federation.client_store import ClientStore
from federation.cohort import Placement, sample_cohort


def config(per_round: int = 3, seed: int = 1) -> Config:
    return Config(seed=seed, clients=Clients(total=1000, per_round=per_round))


# --- sampling -------------------------------------------------------------------------------------


def test_a_cohort_is_so_many_different_candidates_in_order():
    candidates = np.arange(3, 90, 7)
    for round_number in range(1, 50):
        cohort = sample_cohort(config(5), candidates, round_number)
        assert (
            len(cohort) == 5
            and cohort == sorted(set(cohort))
            and set(cohort) <= {*candidates.tolist()}
        )
    assert sample_cohort(config(len(candidates)), candidates, 1) == candidates.tolist()


def test_a_cohort_follows_from_the_seed_and_the_round():
    candidates = np.arange(100)
    cohorts = [sample_cohort(config(seed=seed), candidates, n) for seed in (1, 2) for n in (1, 2)]
    again = [sample_cohort(config(seed=seed), candidates, n) for seed in (1, 2) for n in (1, 2)]
    assert cohorts == again and len(set(map(tuple, cohorts))) == 4


def test_all_candidates_take_part_equally_often():
    candidates, rounds = np.array([2, 3, 5, 7, 11, 13]), 3000
    counts = Counter(c for n in range(rounds) for c in sample_cohort(config(2), candidates, n))
    # Each takes part with probability 1 / 3: 1000 times, give or take a deviation of 26.
    assert counts.keys() == {*candidates.tolist()}
    assert all(abs(count - rounds / 3) < 5 * 26 for count in counts.values())


# --- placement ------------------------------------------------------------------------------------


def state(value: float) -> dict[str, torch.Tensor]:
    return {"residual": torch.full((4,), value)}


def test_one_rank_trains_everybody_and_keeps_all_states(tmp_path):
    def work(ranks):
        placement, store = Placement(ranks, [4, 5]), ClientStore(tmp_path, 1e9)
        assert placement.is_here(4) and placement.holds_state(5)
        placement.place({1: 2.0, 4: 1.0}, store)
        assert placement.is_here(1) and placement.holds_state(4)

    assert on_ranks(1, work) == [None]


def test_every_client_is_trained_by_one_team_and_all_ranks_agree_on_which(tmp_path):
    costs = {client: float(1 + client % 5) for client in range(12)}

    def work(ranks):
        placement = Placement(ranks, [])
        placement.place(costs, ClientStore(tmp_path, 1e9))
        return placement.team_of, {client for client in costs if placement.is_here(client)}

    results = on_ranks(3, work)
    teams, here = zip(*results, strict=True)
    assert teams[0] == teams[1] == teams[2]
    assert sum(map(len, here)) == len(costs) and set.union(*here) == set(costs)


@pytest.mark.parametrize("budget", [1e9, 1], ids=["in memory", "on the disk"])
def test_a_state_moves_with_its_client(tmp_path, budget):
    """Over many rounds of unequal cohorts, the rank that trains a client has its newest state."""

    def work(ranks):
        placement, store, newest = Placement(ranks, []), ClientStore(tmp_path, budget), {}
        for round_number in range(1, 9):
            cohort = [c for c in range(10) if (c + round_number) % 3]
            placement.place({c: float(1 + c % round_number) for c in cohort}, store)
            for client in cohort:
                if placement.holds_state(client):
                    found = store.get(client)
                    expected = state(newest[client]) if client in newest else {}
                    assert found.keys() == expected.keys()
                    assert all(torch.equal(found[key], expected[key]) for key in found)
                    store.stage(client, state(10.0 * round_number + client), round_number)
                newest[client] = 10.0 * round_number + client
            store.commit()
        held = [{c for c in newest if placement.holds_state(c)}, set(store.versions)]
        assert held[0] == held[1]
        return held[0]

    held = on_ranks(3, work)
    assert all(isinstance(clients, set) for clients in held), held
    assert sum(map(len, held)) == len(set.union(*held)) == 10


def test_states_of_a_checkpoint_are_dealt_out_to_the_teams(tmp_path):
    def work(ranks):
        placement = Placement(ranks, [0, 3, 4, 8])
        return [client for client in (0, 3, 4, 8) if placement.holds_state(client)]

    assert on_ranks(3, work) == [[0, 3], [4], [8]]
