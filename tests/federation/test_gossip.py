"""gossip.py: against FedAvg, against mixing with a matrix, and what every schedule must hold."""

from dataclasses import replace

import pytest
import torch
from helpers.runs import (
    PLAIN,
    killed_before_logging,
    ledger,
    make_plain_federation,
    rounds,
    summary,
)

from federation.client import Clients
from network.topologies import gossip_seconds
from training.local_sgd import Interrupted

GOSSIP = ["schedule.name=gossip", "clients.total=6", "clients.per_round=6"]
D_PSGD = [*GOSSIP, "schedule.gossip=D-PSGD"]
SPARSE = ["pruning.method=topk", "pruning.density=0.05", "uplink.values=int8"]
BUFFERS = ["model.name=resnet18", "model.width=0.125"]


def model_of(one, node: int, key: str = "model") -> torch.Tensor:
    return one.clients.store.get(node)[key]


def mean_of(one) -> torch.Tensor:
    return torch.stack([model_of(one, node) for node in range(6)]).mean(0)


def matrix(one) -> torch.Tensor:
    whole = torch.zeros(6, 6)
    for node, row in enumerate(one.weights):
        whole[node, list(row)] = torch.tensor(list(row.values()))
    return whole


@pytest.mark.parametrize("words", [[], BUFFERS], ids=["lenet", "buffers"])
@pytest.mark.parametrize("method", ["D-PSGD", "CHOCO-SGD"])
def test_a_complete_graph_is_fedavg(tmp_path, words, method):
    num_rounds = 1 if words else 3  # BatchNorm makes much of small differences
    words = [*words, "clients.total=6", "clients.per_round=6", "server.weighting=uniform"]
    star = make_plain_federation(tmp_path, *words, name="star")
    words += ["schedule.name=gossip", "schedule.graph=complete", "schedule.gamma=1"]
    words.append(f"schedule.gossip={method}")
    one = make_plain_federation(tmp_path, *words, name="gossip")
    for _ in range(num_rounds):
        (expected, _), (found, _) = star.run_round(), one.run_round()
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        for name in ("parameters", "buffers"):
            ours, theirs = getattr(one.server, name), getattr(star.server, name)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for node in range(6):
        torch.testing.assert_close(
            model_of(one, node), star.server.parameters.detach(), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("graph", ["ring", "torus", "erdos_renyi"])
def test_choco_with_nothing_lost_is_d_psgd_which_mixes_by_the_matrix(tmp_path, graph):
    words = [f"schedule.graph={graph}"]
    one = make_plain_federation(tmp_path, *D_PSGD, *words, name="dpsgd")
    two = make_plain_federation(tmp_path, *GOSSIP, *words, "schedule.gamma=1", name="choco")
    for _ in range(3):
        trained = {}
        spy(one, trained)
        one.run_round(), two.run_round()
        mixed = matrix(one) @ torch.stack([trained[node] for node in range(6)])
        for node in range(6):
            for each in (one, two):
                torch.testing.assert_close(model_of(each, node), mixed[node], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(model_of(one, 0), model_of(one, 3), atol=1e-4)


def spy(one, trained: dict) -> None:
    """From now on fills up, by node, with the model after training and before mixing."""
    mix = type(one)._mixed

    def note(node, state, *rest):
        trained[node] = state["model"].clone()
        return mix(one, node, state, *rest)

    one._mixed = note


@pytest.mark.parametrize("words", [[], SPARSE], ids=["dense", "sparse"])
def test_mixing_leaves_the_mean_of_all_models_as_it_is(tmp_path, words):
    one = make_plain_federation(tmp_path, *GOSSIP, *words, "schedule.gamma=0.4")
    for _ in range(3):
        trained = {}
        spy(one, trained)
        one.run_round()
        before = torch.stack([trained[node] for node in range(6)]).mean(0)
        torch.testing.assert_close(mean_of(one), before, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one.server.parameters.detach(), before, rtol=1e-6, atol=1e-6)


def test_choco_is_the_algorithm_of_the_paper_with_estimates_of_all_neighbours(tmp_path):
    """The oracle holds every x_hat: x <- x + gamma * sum of w_ij * (x_hat_j - x_hat_i)."""
    gamma = 0.4
    one = make_plain_federation(tmp_path, *GOSSIP, *SPARSE, f"schedule.gamma={gamma}")
    weights = matrix(one)
    estimates = one.server.parameters.detach().repeat(6, 1)
    for _ in range(3):
        trained, sent = {}, {}
        spy(one, trained)
        exchange = type(one)._exchange

        def note(reports, number, sent=sent, exchange=exchange):
            for report in reports:
                sent[report.client] = one._decode(report, number)["update"].dense()
            exchange(one, reports, number)

        one._exchange = note
        one.run_round()
        for node in range(6):
            assert 0 < torch.count_nonzero(sent[node]) <= 0.05 * estimates.shape[1] + 1
            estimates[node] += sent[node]
        pulls = weights @ estimates - estimates
        for node in range(6):
            expected = trained[node] + gamma * pulls[node]
            torch.testing.assert_close(model_of(one, node), expected, rtol=1e-5, atol=1e-6)


def test_compressed_gossip_comes_to_an_agreement(tmp_path):
    """Without training the models of nodes that differ approach their mean."""
    words = ["local.lr=0.5", "rounds=200", "evaluation.every=200"]
    one = make_plain_federation(tmp_path, *GOSSIP, *SPARSE, *words, "local.steps=1")
    one.run_round()
    config = one.clients.config
    one.clients.config = replace(config, local=replace(config.local, lr=1e-12))

    def spread():
        return max(float((model_of(one, node) - mean_of(one)).norm()) for node in range(6))

    before = spread()
    for _ in range(20):
        one.run_round()
    assert spread() < 0.5 * before


def test_every_message_is_in_the_ledger_and_takes_its_time(tmp_path):
    words = [*D_PSGD, "network.uplink_mbps=8", "network.latency_ms=50"]
    one = make_plain_federation(tmp_path, *words)
    row, rows = one.run_round()
    ends = {(int(r.sender), int(r.receiver)) for r in rows}
    assert ends == {(i, (i + step) % 6) for i in range(6) for step in (1, 5)} and len(rows) == 12
    assert all(r.direction == "up" and r.kind == "update" for r in rows)
    assert row["bytes_up"] == sum(r.bytes for r in rows) and row["bytes_down"] == 0
    assert all(r.dense_bytes == 4 * one.model.layout.size for r in rows)
    expected = one.workload.num_trained[0] * 5e-3 + gossip_seconds(2, rows[0].bytes, 8, 50)
    assert row["simulated_seconds"] == pytest.approx(expected)


def test_a_node_that_diverges_keeps_its_model_and_still_mixes(tmp_path, monkeypatch):
    train = Clients._finish

    def diverges(self, trained, *rest):
        done = train(self, trained, *rest)
        if done.report.client == 2:
            done.update.fill_(float("nan"))
        return done

    monkeypatch.setattr(Clients, "_finish", diverges)
    one = make_plain_federation(tmp_path, *GOSSIP)
    start = one.server.parameters.detach().clone()
    trained = {}
    spy(one, trained)
    row, rows = one.run_round()
    assert row["failures"] == {"2": "the update is not finite"} and row["num_clients"] == 5
    assert torch.equal(trained[2], start) and not torch.equal(model_of(one, 2), start)
    assert len(rows) == 12 and torch.isfinite(one.server.parameters).all()


def test_where_a_payload_is_refused_nobody_mixes(tmp_path, monkeypatch):
    one = make_plain_federation(tmp_path, *GOSSIP, *SPARSE)
    encode = one._encode

    def damaged(update, *rest):
        report = encode(update, *rest)
        if report.client == 2:
            payload = bytearray(report.messages[0].payload)
            payload[40] ^= 1
            report.messages[0] = replace(report.messages[0], payload=bytes(payload))
        return report

    one._encode, start = damaged, one.server.parameters.detach().clone()
    row, _ = one.run_round()
    assert "checksum" in row["failures"]["2"] and row["num_clients"] == 5
    for node in range(6):
        assert "pull" not in one.clients.store.get(node)
        assert torch.equal(model_of(one, node, "estimate"), start)
        assert not torch.equal(model_of(one, node), start)
    del one._encode
    assert one.run_round()[0]["num_clients"] == 6 and "pull" in one.clients.store.get(0)


@pytest.mark.parametrize("words", [D_PSGD, [*GOSSIP, *SPARSE]], ids=["D-PSGD", "CHOCO-SGD"])
def test_models_on_the_disk_give_the_same_run(tmp_path, words):
    one = make_plain_federation(tmp_path, *words, name="memory")
    two = make_plain_federation(tmp_path, *words, "clients.state_memory_gib=1e-9", name="disk")
    for _ in range(3):
        one.run_round(), two.run_round()
        assert two.clients.store.on_host.num_bytes == 0
    assert one.server.sha256() == two.server.sha256()


def test_the_last_round_scores_the_nodes_too(run):
    _, folder = run(*PLAIN, *GOSSIP, "rounds=2")
    first, last = rounds(folder)
    assert "node_accuracy_mean" not in first
    assert last["node_accuracy_worst"] <= last["node_accuracy_mean"] <= 1
    assert summary(folder)["node_accuracy_mean"] == last["node_accuracy_mean"]


@pytest.mark.parametrize("words", [D_PSGD, [*GOSSIP, *SPARSE]], ids=["D-PSGD", "CHOCO-SGD"])
def test_a_killed_run_goes_on_to_the_same_end(run, monkeypatch, words):
    words = [*PLAIN, *words, "rounds=5", "network.jitter_ms=20"]
    _, whole = run(*words, name="whole")
    killed = killed_before_logging(run, monkeypatch, 4, *words)
    assert summary(killed)["model_sha256"] == summary(whole)["model_sha256"]
    assert (killed / "ledger.csv").read_text() == (whole / "ledger.csv").read_text()
    up = sum(int(row["bytes"]) for row in ledger(whole))
    assert up == summary(whole)["bytes_up"]


def test_a_stop_in_the_middle_undoes_the_round(tmp_path, monkeypatch):
    one = make_plain_federation(tmp_path, *GOSSIP, *SPARSE, name="stopped")
    two = make_plain_federation(tmp_path, *GOSSIP, *SPARSE, name="whole")
    train, calls = Clients._train_one, []

    def stop(self, *rest):
        if calls.append(1) or len(calls) == 4:
            raise Interrupted
        return train(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Clients, "_train_one", stop)
        with pytest.raises(Interrupted):
            one.run_round()
    assert one.clients.store.versions == {}
    for _ in range(2):
        one.run_round(), two.run_round()
    assert one.server.sha256() == two.server.sha256()
