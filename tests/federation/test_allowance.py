"""allowance.py: a run spends its budget, and spends it where clients lack most."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import killed_before_logging, ledger, make_federation, summary

from command_line import load_config
from config import Clients, Config, ConfigError, Downlink, Local, LrSchedule, Model
from federation.agreement import Agreement
from federation.allowance import GAIN, Allowance
from federation.budget import with_downlink_budget
from federation.downlink import Copies
from federation.messages import Report
from layout import Layout

LAYOUT = Layout(("w", "b"), ((300, 20), (30,)))
ROUNDS, CLIENTS, COHORT = 120, 30, 5


def agreement(budget="20x", schedule="cosine", **settings) -> Agreement:
    config = Config(
        rounds=ROUNDS,
        clients=Clients(total=CLIENTS, per_round=COHORT),
        local=Local(lr=0.1, lr_schedule=LrSchedule(name=schedule)),
        downlink=Downlink(budget=budget),
        **settings,
    )
    return Agreement(with_downlink_budget(config), LAYOUT, Layout((), ()))


def play(link: Copies, schedule: str, seed: int = 0) -> list[int]:
    """The bytes of each round, while the model walks at random by steps as long as the rate."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    vector, copies, spent = link.first.clone(), {}, []
    for number in range(1, ROUNDS + 1):
        cohort = sorted(rng.choice(CLIENTS, COHORT, replace=False).tolist())
        sent, _ = link.send(vector, number, cohort)
        bring, reports = link.to_each(sent, number), []
        for client in cohort:
            copies[client], message = bring(client, copies.get(client))
            reports.append(Report(client, 1, received=[message]))
        link.observe(reports, number)
        spent.append(sum(m.num_bytes for r in reports for m in r.received))
        rate = 1 if schedule == "constant" else 0.5 * (1 + np.cos(np.pi * number / ROUNDS))
        vector = vector + rate * torch.randn(LAYOUT.size, generator=generator)
    return spent


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("budget", ["10x", "40x"])
def test_a_run_spends_what_its_budget_says(budget, schedule):
    told = agreement(budget, schedule)
    spent = play(Copies(told, torch.zeros(LAYOUT.size)), schedule)
    dense = 4 * LAYOUT.size * ROUNDS * COHORT
    assert dense / sum(spent) == pytest.approx(float(budget[:-1]), rel=0.1)
    if schedule == "constant":  # all rounds have the same to send
        assert sum(spent[-20:]) / sum(spent) == pytest.approx(1 / 6, rel=0.2)


def test_a_client_that_lacks_more_receives_more():
    link = Copies(agreement(), torch.zeros(LAYOUT.size))
    vector = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(0))
    link.send(vector, 2, [0, 1])
    bring = link.to_each(vector, 2)
    (_, few), (_, many) = bring(0, 0.9 * vector), bring(1, None)
    assert many.num_values > 2 * few.num_values >= 0


def test_the_first_limit_is_that_of_a_newcomer_and_nothing_moves_below_it():
    allowance = Allowance(agreement())
    assert allowance.limit_of(torch.zeros(LAYOUT.size), 1) == float("inf")
    lacks = torch.zeros(LAYOUT.size)
    lacks[:3] = torch.tensor([3.0, -2.0, 1.0])
    assert allowance.limit_of(lacks, 2) == 1.0  # fewer have moved than could travel
    assert allowance.limit_of(5 * lacks, 3) == 5.0


def test_the_limit_follows_what_was_spent():
    """Towards the magnitude that fewer, or more, entries of a newcomer's vector have."""
    lacks = torch.arange(LAYOUT.size).float()
    for over in (0.1, 0.5, 1.0, 2.0, 30.0):
        allowance = Allowance(agreement())
        limit = allowance.limit_of(lacks, 50)
        before = int((lacks > limit).sum())
        allowance.spend(over * allowance.of_round(50), limit, 50)
        after = int((lacks > allowance.limit_of(lacks, 51)).sum())
        assert after == pytest.approx(before / over**GAIN, abs=2)


def test_newcomers_receive_what_the_first_rounds_can_pay_for():
    allowance, lacks = Allowance(agreement()), torch.arange(LAYOUT.size).float()
    for number in range(1, CLIENTS // COHORT):
        allowance.spend(10 * allowance.of_round(number), 1.0, number)
        travel = int((number * lacks > allowance.limit_of(number * lacks, number)).sum())
        assert travel == pytest.approx(allowance.of_round(number) / COHORT, abs=2)


def test_what_a_round_leaves_goes_to_the_later_ones():
    allowance, total = Allowance(agreement()), 0.0
    given = allowance.left
    for number in range(1, ROUNDS + 1):
        spent = allowance.of_round(number) if number >= 10 else 0.0
        allowance.spend(spent, 1.0, number)
        total += spent
    assert total == pytest.approx(given) and allowance.left == pytest.approx(0, abs=1)


BUDGET = ["downlink.budget=25x", "rounds=30", "clients.total=5", "model.width=0.5"]


def test_a_run_lands_within_a_tenth_of_its_ratio_and_resumes_to_the_same_end(run, monkeypatch):
    status, whole = run(*BUDGET, name="whole")
    assert status == 0
    result = summary(whole)
    ratio = result["dense_bytes_down"] / result["bytes_down"]
    assert ratio == pytest.approx(25, rel=0.1)
    assert {row["kind"] for row in ledger(whole) if row["direction"] == "down"} == {"model_change"}
    killed = killed_before_logging(run, monkeypatch, 17, *BUDGET)
    assert summary(killed)["model_sha256"] == result["model_sha256"]
    assert (killed / "ledger.csv").read_text() == (whole / "ledger.csv").read_text()


def test_a_round_that_is_given_up_leaves_the_limit_as_it_was():
    link = Copies(agreement(), torch.zeros(LAYOUT.size))
    before = link.state()
    link.send(torch.ones(LAYOUT.size), 2, [0])
    assert link.state() == before and link.limit == 1.0


def test_weights_that_do_not_exist_are_not_lacking():
    """With a mask, the first weights off it would otherwise set the limit."""
    link = Copies(agreement(), torch.ones(LAYOUT.size))
    kept = np.arange(0, LAYOUT.size, 2)
    link.agreement.use_mask(kept)
    vector = torch.zeros(LAYOUT.size)
    vector[kept] = 1.001
    link.send(vector, 2, [0])
    assert link.limit == pytest.approx(0.001, rel=1e-3)


def test_a_checkpoint_holds_what_is_left(tmp_path):
    one = make_federation(tmp_path, *BUDGET)
    for _ in range(3):
        one.run_round()
    state = one.server.state()["downlinks"]["model"]
    other = make_federation(tmp_path, *BUDGET, name="other")
    other.server.load(one.server.state())
    assert other.server.downlinks["model"].state() == state
    assert 0 < state["left"] < Allowance(one.server.agreement).left


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["downlink.budget=lots"], "downlink.budget: 'lots' is not how many times fewer bytes"),
        (["downlink.budget=9x", "submodel.widths=[1,0.5]"], "does not go with submodel.widths"),
        (["downlink.budget=9x", "local.algorithm=SCAFFOLD"], "of which no copies are kept"),
    ],
)
def test_what_is_no_budget_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Path("configs/default.yaml"), words)


def test_a_budget_that_hardly_pays_for_heads_or_buffers_is_refused():
    with pytest.raises(ConfigError, match="leaves 24 bytes a message; set a smaller number$"):
        Allowance(agreement("1000x"))
    told = agreement("1000x", model=Model(name="resnet18", norm_policy="average"))
    told = Agreement(told.config, LAYOUT, Layout(("mean",), ((10,),)))
    with pytest.raises(ConfigError, match="or model.norm_policy=static"):
        Allowance(told)
