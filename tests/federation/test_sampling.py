"""sampling.py, tifl.py, oort.py: who begins a round."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from helpers.runs import killed_before_logging, make_federation, rounds, summary

from config import Clients, Config, Schedule
from federation.messages import Report
from federation.samplers import SAMPLERS

CLIENTS = np.arange(40)


def config(sampling: str, per_round: int = 4, **settings) -> Config:
    schedule = Schedule(sampling=sampling, **settings)
    return replace(Config(), clients=Clients(total=40, per_round=per_round), schedule=schedule)


def report(client: int, loss: float = 1.0, num_examples: int = 10) -> Report:
    return Report(client, num_examples, loss=loss, step_length=1.0)


@pytest.mark.parametrize("name", ["uniform", "tifl", "oort"])
def test_a_cohort_is_of_different_clients_that_are_there(name):
    there = CLIENTS[CLIENTS % 3 > 0]
    one, two = (SAMPLERS[name](config(name), lambda client: 1.0 + client) for _ in range(2))
    for round_number in range(1, 30):
        cohort = one.choose(there, round_number)
        assert cohort == sorted(set(cohort)) and len(cohort) == 4 and np.isin(cohort, there).all()
        assert two.choose(there, round_number) == cohort
        for sampler in (one, two):
            sampler.observe(round_number, [report(c) for c in cohort], dict.fromkeys(cohort, 2.0))
        if round_number == 15:  # as after a kill
            two = SAMPLERS[name](config(name), lambda client: 1.0 + client)
            two.load(one.state())
    assert one.choose(np.array([5, 7]), 99) == [5, 7]  # fewer than are wanted


def test_a_tier_holds_clients_of_about_equal_speed():
    sampler = SAMPLERS["tifl"](config("tifl", tiers=5), lambda client: (7 * client) % 40)
    by_speed = sorted(CLIENTS.tolist(), key=lambda client: (7 * client) % 40)
    tiers = [set(by_speed[start : start + 8]) for start in range(0, 40, 8)]
    counts = Counter()
    for round_number in range(400):
        cohort = set(sampler.choose(CLIENTS, round_number))
        [tier] = [number for number, members in enumerate(tiers) if cohort <= members]
        counts[tier] += 1
    assert all(abs(count - 80) < 5 * math.sqrt(80) for count in counts.values())


def explored(seconds: dict[int, float], losses: dict[int, float]):
    """An Oort for which everybody has taken part in round 1."""
    sampler = SAMPLERS["oort"](config("oort"), np.vectorize(seconds.get, otypes=[float]))
    sampler.observe(1, [report(client, losses[client]) for client in CLIENTS.tolist()], seconds)
    return sampler


def test_clients_of_a_high_loss_come_first():
    losses = {client: 5.0 if client >= 30 else 0.1 for client in CLIENTS}
    sampler = explored(dict.fromkeys(CLIENTS, 1.0), losses)
    chosen = Counter(c for n in range(200, 300) for c in sampler.choose(CLIENTS, n))
    assert set(chosen) <= set(range(30, 40)) and len(chosen) == 10


def test_clients_that_are_too_slow_come_later():
    """Twice the preferred time costs a factor of four of utility (alpha = 2)."""
    seconds = {client: 2.0 if client >= 35 else 1.0 for client in CLIENTS}
    losses = {client: 3.0 if client >= 35 else 1.0 for client in CLIENTS}
    sampler = explored(seconds, losses)
    utilities = {client: sampler._of(client, 1, 1.0) for client in (0, 39)}
    assert utilities[39] == pytest.approx(utilities[0] * 3 / 4)
    chosen = {c for n in range(200, 300) for c in sampler.choose(CLIENTS, n)}
    assert not chosen & set(range(35, 40))


def test_the_longer_a_client_was_away_the_more_uncertain_is_its_utility():
    sampler = explored(dict.fromkeys(CLIENTS, 1.0), dict.fromkeys(CLIENTS, 1.0))
    sampler.observe(50, [report(3)], {3: 1.0})
    assert sampler._of(2, 100, 1.0) - sampler._of(3, 100, 1.0) == pytest.approx(
        math.sqrt(0.1 * math.log(100)) - math.sqrt(0.1 * math.log(100) / 50)
    )


def test_at_first_most_of_a_cohort_is_explored_and_faster_clients_sooner():
    sampler = SAMPLERS["oort"](
        config("oort", per_round=10), lambda client: 1.0 + 9 * (client >= 20)
    )
    sampler.observe(1, [report(client) for client in range(5)], dict.fromkeys(range(5), 1.0))
    cohort = sampler.choose(CLIENTS, 2)
    new = [client for client in cohort if client >= 5]
    assert len(new) == round(0.9 * 0.98 * 10) and sum(client < 20 for client in new) > len(new) / 2


@pytest.mark.parametrize("name", ["tifl", "oort"])
def test_a_run_resumes_with_what_the_sampler_knows(run, monkeypatch, name):
    words = [f"schedule.sampling={name}", "clients.total=8", "clients.per_round=3", "rounds=8"]
    words += ["network.spread=1", "schedule.tiers=2", "schedule.over_selection=1.34"]
    _, whole = run(*words, name="whole")
    killed = killed_before_logging(run, monkeypatch, 6, *words)
    assert summary(killed)["model_sha256"] == summary(whole)["model_sha256"]
    assert all(row["num_late"] == 2 for row in rounds(whole))  # ceil(3 * 1.34) begin


def test_faster_tiers_make_faster_rounds(tmp_path):
    """On average a round of a tier ends sooner than one that waits for the slowest of all."""
    words = ["clients.total=20", "clients.per_round=4", "network.spread=1.5", "local.steps=1"]
    mixed = make_federation(tmp_path, *words, name="mixed")
    tiered = make_federation(tmp_path, *words, "schedule.sampling=tifl", name="tiered")
    for _ in range(12):
        mixed.run_round()
        tiered.run_round()
    assert tiered.clock.now < 0.8 * mixed.clock.now
