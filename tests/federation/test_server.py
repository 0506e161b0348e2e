"""server.py: averages against float64, clients that are left out, and the step that follows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.ends import NO_BUFFERS, add, make_server, report_of
from helpers.runs import make_plain_federation
from hypothesis import given, settings
from hypothesis import strategies as st

from compression import encode
from config import Config, ConfigError, Downlink, Local, Mask, Pruning, Uplink
from config import Server as ServerSettings
from federation.agreement import Agreement
from federation.cohort import sample_cohort
from federation.messages import SERVER, Report
from federation.server import Average
from layout import Layout

LAYOUT, BUFFERS = (
    Layout(("w", "b"), ((6, 5), (10,))),
    Layout(("mean", "var", "steps"), ((), (), ())),
)
IS_COUNTER, IS_VARIANCE = torch.tensor([0, 0, 1]).bool(), torch.tensor([0, 1, 0]).bool()
SIZES = [1, 20, 3, 11, 4]  # examples of each client


def config(algorithm="FedAvg", values="fp32", **server) -> Config:
    return Config(
        local=Local(algorithm=algorithm),
        pruning=Pruning(method="none"),
        uplink=Uplink(values=values, error_feedback=False),
        server=ServerSettings(**{"optimizer": "FedAvg"} | server),
    )


AGREEMENT = Agreement(config("SCAFFOLD"), LAYOUT, BUFFERS)


def vector(seed: int) -> torch.Tensor:
    return torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(seed))


def vectors_of(client: int) -> dict[str, torch.Tensor]:
    buffers = torch.tensor([-client, client, 100 - client], dtype=torch.float32)
    return {"update": vector(client), "control": vector(client + 50), "buffers": buffers}


def wounded(report: Report, kind: str = "update") -> Report:
    messages = [
        replace(m, payload=bytes(m.payload)[:-1]) if m.kind == kind else m for m in report.messages
    ]
    return replace(report, messages=messages)


def failed(report: Report) -> Report:
    report.fail("it fell over")
    return report


def average_of(ways: dict[int, str], weights: dict[int, int]) -> Average:
    """The average of clients that arrive whole, are refused, or fail."""
    average = Average(AGREEMENT, weights, IS_COUNTER, IS_VARIANCE, with_norms=True)
    change = {"whole": lambda r: r, "refused": wounded, "failed": failed}
    for client, way in ways.items():
        add(average, change[way](report_of(AGREEMENT, client, **vectors_of(client))), 1)
    return average


# --- averages -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.sampled_from(["whole", "whole", "refused", "failed"]), min_size=1, max_size=5))
@pytest.mark.parametrize("weights", [SIZES, [1] * 5], ids=["examples", "uniform"])
def test_an_average_is_that_of_float64_over_those_who_did_not_fail(weights, ways):
    ways = dict(enumerate(ways))
    average = average_of(ways, {client: weights[client] for client in ways})
    averages, there = average.finish(), [c for c, way in ways.items() if way == "whole"]
    assert [report.client for report in average.averaged] == there
    failures = {report.client: report.failure for report in average.reports}
    for client, way in ways.items():
        assert failures[client].startswith(
            {"whole": "", "refused": "payload refused: ", "failed": "it fell over"}[way]
        )
        assert bool(failures[client]) == (way != "whole")
    if not there:
        return
    total = sum(weights[client] for client in there)
    for kind in ("update", "control", "buffers"):
        sums = sum(weights[c] * vectors_of(c)[kind].double() for c in there)
        expected = sums / total
        if kind == "buffers":
            expected[2] = 100 - min(there)  # the largest counter
        torch.testing.assert_close(averages[kind].double(), expected, rtol=2e-6, atol=2e-6)
    norms = sum(weights[c] * float(vector(c).double().square().sum()) for c in there) / total
    assert float(averages["squared_norm"]) == pytest.approx(norms, rel=2e-6)


def test_nothing_of_a_report_is_added_unless_all_of_it_decodes():
    average = Average(AGREEMENT, {0: 1, 1: 1}, IS_COUNTER, IS_VARIANCE, with_norms=True)
    add(average, report_of(AGREEMENT, 0, **vectors_of(0)), 1)
    before = {kind: some.clone() for kind, some in average.sums.items()}
    counters = average.counters.clone()
    add(average, wounded(report_of(AGREEMENT, 1, **vectors_of(1)), "buffers"), 1)
    assert all(torch.equal(average.sums[kind], before[kind]) for kind in before)
    assert torch.equal(average.counters, counters)
    assert average.reports[1].failure.startswith("payload refused: ")


def test_a_report_whose_payloads_are_elsewhere_is_noted_and_counts():
    average = Average(AGREEMENT, {0: 1, 1: 1}, IS_COUNTER, IS_VARIANCE, with_norms=False)
    add(average, report_of(AGREEMENT, 1, **vectors_of(1)).without_payloads(), 1)
    assert average.sums == {} and [report.client for report in average.averaged] == [1]


def test_the_payload_of_another_client_is_refused_where_the_choice_is_random():
    settings = replace(config(), pruning=Pruning(method="random", density=0.3))
    agreement = Agreement(settings, LAYOUT, NO_BUFFERS)
    none = torch.zeros(0).bool()
    average = Average(agreement, {1: 1, 2: 1}, none, none, with_norms=False)
    stolen = report_of(agreement, 1, update=vector(1))
    add(average, replace(stolen, client=2), 1)
    assert "another layout" in average.reports[0].failure


def test_a_negative_variance_is_refused(tmp_path):
    one = make_plain_federation(tmp_path, "model.name=resnet18", "model.width=0.0625")
    cohort = sample_cohort(one.config, one.candidates, 1)
    broadcast = one.server.broadcast(1, cohort)
    updates = one.clients.train(cohort, 1, broadcast)
    reports = [one.clients.uplink.encode(update, 1) for update in updates]
    buffers = one.server.buffers.clone()
    buffers[one.model.is_variance.nonzero()[3]] = -1e-3
    payload, _ = encode(buffers, one.model.buffer_layout)
    reports[0].messages = [
        replace(message, payload=payload) if message.kind == "buffers" else message
        for message in reports[0].messages
    ]
    average = one.server.new_average(cohort)
    for report in reports:
        add(average, report, 1)
    assert one.server.step(average, 1) == cohort[1:]
    assert reports[0].failure == "payload refused: buffers: a running variance is negative"
    assert (one.server.buffers[one.model.is_variance] > 0).all()


# --- the step -------------------------------------------------------------------------------------


def served(settings: Config, vectors: dict[int, torch.Tensor], round_number: int = 1, server=None):
    """A server after one step by these clients' updates, and whom it averaged."""
    server = server or make_server(settings, LAYOUT, SIZES)
    average = server.new_average(list(vectors))
    for client, update in vectors.items():
        kinds = {"update": update}
        if server.algorithm.up:
            kinds[server.algorithm.up] = vector(client + 50)
        report = report_of(server.agreement, client, round_number, **kinds)
        add(average, replace(report, step_length=1.0 + client), round_number)
    return server, server.step(average, round_number)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_fedavg_moves_the_model_by_the_weighted_average(weighting):
    before = make_server(config(), LAYOUT, SIZES).parameters.detach()
    server, averaged = served(config(weighting=weighting), {1: vector(1), 4: vector(4)})
    w1, w4 = (20, 4) if weighting == "examples" else (1, 1)
    moved = (w1 * vector(1) + w4 * vector(4)) / (w1 + w4)
    torch.testing.assert_close(server.parameters.detach(), before + moved)
    assert averaged == [1, 4] and server.parameters.grad is None


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_the_algorithm_learns_the_cohorts_share_and_its_mean_step_length(weighting):
    seen = []
    server = make_server(config(weighting=weighting), LAYOUT, SIZES)
    server.algorithm.aggregate = lambda *given: seen.append(given)
    served(None, {1: vector(1), 3: vector(3)}, server=server)
    [(averages, _, share, step_length)] = seen
    w = {1: 20, 3: 11} if weighting == "examples" else {1: 1, 3: 1}
    assert share == sum(w.values()) / (sum(SIZES) if weighting == "examples" else 5)
    assert step_length == pytest.approx((w[1] * 2.0 + w[3] * 4.0) / sum(w.values()))
    assert averages.keys() == {"update"}


def test_a_round_with_nobody_left_keeps_everything():
    server, _ = served(config("SCAFFOLD", optimizer="FedYogi"), {1: vector(1)})
    before = [tensor.clone() for tensor in (server.parameters.data, server.vector)]
    m = server.optimizer.state_dict()["state"][0]
    kept = {key: value.clone() for key, value in m.items() if isinstance(value, torch.Tensor)}
    average = server.new_average([1, 2])
    vectors = {kind: vector(1) for kind in ("update", "control")}
    add(average, wounded(report_of(server.agreement, 1, 2, **vectors)), 2)
    add(average, Report(2, 3, failure="it fell over"), 2)
    assert server.step(average, 2) == []
    after = server.optimizer.state_dict()["state"][0]
    assert torch.equal(server.parameters.data, before[0]) and torch.equal(server.vector, before[1])
    assert kept and all(torch.equal(after[key], kept[key]) for key in kept)


def test_a_step_that_makes_the_model_infinite_is_an_error():
    huge = torch.full((LAYOUT.size,), 3e38)
    with pytest.raises(ConfigError, match="made the model inf or NaN"):
        served(config(lr=10.0), {0: huge})


def test_no_finite_scores_are_an_error_that_says_what_to_do():
    mask = Mask(method="snip", density=0.5)
    server = make_server(replace(config(), pruning=Pruning(mask=mask)), LAYOUT, SIZES)
    average = server.new_average([0])
    add(average, Report(0, 1, failure="the scores are not finite"), 0)
    with pytest.raises(ConfigError, match="no client has finite scores; take another seed"):
        server.choose_mask(average)


# --- what is broadcast ----------------------------------------------------------------------------


def test_every_message_is_addressed_and_says_what_it_stands_for():
    server = make_server(config("SCAFFOLD"), LAYOUT, SIZES)
    broadcast = server.broadcast(1, [1, 4])
    assert broadcast.messages.keys() == {1, 4}
    for client, messages in broadcast.messages.items():
        assert [message.kind for message in messages] == ["model", "control"]
        assert {(m.sender, m.receiver, m.direction) for m in messages} == {(SERVER, client, "down")}
        assert [m.dense_values for m in messages] == [LAYOUT.size] * 2
    assert torch.equal(broadcast.parameters, server.parameters.data)
    assert torch.equal(broadcast.vector, server.vector)


def test_before_the_first_round_only_the_model_travels_and_stands_for_nothing():
    server = make_server(config("SCAFFOLD"), LAYOUT, SIZES)
    broadcast = server.broadcast(0, [1])
    [message] = broadcast.messages[1]
    assert (message.kind, message.dense_values) == ("model", 0) and broadcast.vector is None


# --- checkpoints and masks ------------------------------------------------------------------------

DYNAMIC = Mask(method="dynamic", density=0.5, every=1)


def masked(algorithm="SCAFFOLD", optimizer="FedYogi", mode="change") -> Config:
    return replace(
        config(algorithm, optimizer=optimizer),
        rounds=100,
        pruning=Pruning(method="none", mask=DYNAMIC),
        downlink=Downlink(mode=mode, values="qsgd4" if mode == "change" else "fp32"),
    )


def a_round(server, round_number: int, cohort: list[int]):
    """Everything that a server does in a round; return its broadcast."""
    broadcast = server.broadcast(round_number, cohort)
    average = server.new_average(cohort)
    for client in cohort:
        gradient = vector(1000 * round_number + client)
        report = report_of(
            server.agreement,
            client,
            round_number,
            update=0.1 * gradient,
            growth=gradient,
            **{server.algorithm.up: gradient} if server.algorithm.up else {},
        )
        add(average, report, round_number)
    assert server.step(average, round_number) == cohort
    server.commit(round_number, cohort)
    return broadcast


@pytest.mark.parametrize("mode", ["model", "change"])
@pytest.mark.parametrize("algorithm", ["FedAvg", "SCAFFOLD", "FedDyn", "FedCM"])
def test_a_server_goes_on_from_its_state_as_if_nothing_had_happened(tmp_path, algorithm, mode):
    server = make_server(masked(algorithm, mode=mode), LAYOUT, SIZES)
    for number, cohort in enumerate([[0, 1], [1, 3], [0, 2]], 1):
        a_round(server, number, cohort)
    torch.save(server.state(), tmp_path / "state.pt")
    again = make_server(masked(algorithm, mode=mode), LAYOUT, SIZES, seed=9)
    again.load(torch.load(tmp_path / "state.pt", weights_only=True))
    for number, cohort in enumerate([[1, 4], [0, 3]], 4):
        there, here = (a_round(one, number, cohort) for one in (server, again))
        assert there.messages == here.messages and there.mask_version == here.mask_version
        assert again.sha256() == server.sha256()


@pytest.mark.parametrize("optimizer", ["FedAvgM", "FedYogi", "FedAdam"])
def test_a_weight_that_left_the_mask_comes_back_without_a_past(optimizer):
    """Neither its value nor the optimizer's memory is there any more."""
    server = make_server(masked(optimizer=optimizer), LAYOUT, SIZES)
    a_round(server, 1, [0, 1])
    gone = server.mask.kept[::2]
    server._use_mask(np.setdiff1d(server.mask.kept, gone))
    server._use_mask(np.union1d(server.mask.kept, gone))
    others = np.setdiff1d(server.mask.kept, gone)
    [memory] = server.optimizer.state_dict()["state"].values()
    moments = [v for v in memory.values() if isinstance(v, torch.Tensor) and len(v.shape)]
    zeros = [server.parameters.data, server.downlinks["model"].shared, moments[0]]
    assert not any(some[gone].any() for some in zeros)
    for some in (*zeros, *moments):  # second moments begin at v0
        assert len(some[gone].unique()) == 1 and len(some[others].unique()) > 1
