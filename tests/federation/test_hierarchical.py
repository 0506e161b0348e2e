"""hierarchical.py: against the synchronous schedule, plain sums, and a closed form of time."""

import numpy as np
import pytest
import torch
from helpers.runs import (
    damage_first,
    killed_before_logging,
    ledger,
    make_federation,
    rounds,
    summary,
)

from bandwidth_analysis import read_run
from federation.client import Clients
from network.profiles import LINKS
from network.topologies import hierarchical_seconds, message_seconds
from training.local_sgd import Interrupted

EDGES = ["schedule.name=hierarchical", "schedule.edges=2"]
DENSE = ["pruning.method=none", "uplink.values=fp32", "uplink.error_feedback=false"]
SPARSE = ["pruning.method=topk", "pruning.density=0.05", "uplink.values=int8"]
BUFFERS = [*DENSE, "model.name=resnet18", "model.width=0.125"]


@pytest.mark.parametrize("words", [DENSE, SPARSE, BUFFERS], ids=["dense", "sparse", "buffers"])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_one_edge_round_is_the_synchronous_schedule(tmp_path, words, weighting):
    num_rounds = 1 if words is BUFFERS else 3  # BatchNorm makes much of small differences
    words = [*words, "data.partition.name=linear", f"server.weighting={weighting}"]
    one = make_federation(tmp_path, *words, name="star")
    two = make_federation(tmp_path, *words, *EDGES, name="edges")
    for _ in range(num_rounds):
        (expected, _), (found, _) = one.run_round(), two.run_round()
        assert found["num_clients"] == expected["num_clients"] == 3
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        for name in ("parameters", "buffers"):
            ours, theirs = getattr(two.server, name), getattr(one.server, name)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_edges_average_several_times_before_the_cloud_does(tmp_path):
    """Each edge server is as a synchronous run of its own clients, from the cloud's model on."""
    words = [*DENSE, "server.optimizer=FedAvg", "clients.per_round=4"]
    hierarchy = make_federation(tmp_path, *words, *EDGES, "schedule.edge_rounds=3", "rounds=1")
    start = hierarchy.server.parameters.detach().clone()
    row, _ = hierarchy.run_round()
    moved = torch.zeros_like(start)
    for edge in range(2):
        star = make_federation(tmp_path, *words, "clients.per_round=2", name=f"star{edge}")
        star.candidates = np.array([edge, edge + 2])
        for _ in range(3):
            star.run_round()
        share = sum(star.server.weights[c] for c in star.candidates) / sum(star.server.weights)
        moved += share * (star.server.parameters.detach() - start)
    torch.testing.assert_close(
        hierarchy.server.parameters.detach() - start, moved, rtol=1e-5, atol=1e-6
    )
    assert row["num_clients"] == 4 and row["num_failed"] == 0


def test_every_hop_is_in_the_ledger_and_takes_the_time_of_its_link(tmp_path):
    words = [*DENSE, *EDGES, "schedule.edge_rounds=2", "clients.per_round=4", "local.epochs=1"]
    words += ["network.uplink_mbps=8", "network.downlink_mbps=8", "network.latency_ms=50"]
    one = make_federation(tmp_path, *words, "schedule.edge_link=datacenter")
    row, rows = one.run_round()
    hops = [(r.direction, r.sender, r.receiver, r.kind) for r in rows]
    assert hops.count(("down", "server", "edge0", "model")) == 1
    assert hops.count(("up", "edge1", "server", "update")) == 1
    assert hops.count(("down", "edge1", "3", "model")) == 2
    assert hops.count(("up", "2", "edge0", "update")) == 2
    assert len(rows) == 2 * 2 + 2 * 2 * 4
    size = {r.kind: r.bytes for r in rows}
    assert all(abs(r.bytes - 4 * one.model.layout.size) < 0.15 * r.bytes for r in rows)
    latency = LINKS["datacenter"].latency_ms
    cloud, edge = (LINKS["datacenter"].uplink_mbps, latency), (8, 50)
    training = one.workload.num_trained[0] * 5e-3
    down = message_seconds(size["model"], *edge)  # the formula has no way down
    expected = hierarchical_seconds(size["update"], training + down, 1, 2, edge, cloud)
    expected += message_seconds(size["model"], *cloud)
    assert row["simulated_seconds"] == pytest.approx(expected, rel=1e-3)


def test_the_run_folder_shows_the_clients_and_not_the_edge_servers(run):
    words = ["network.links={4g: 1}", "schedule.edge_rounds=2", "rounds=1", "clients.per_round=4"]
    _, folder = run(*SPARSE, *EDGES, *words, draws=True)
    assert len((folder / "population.csv").read_text().splitlines()) == 1 + 4
    shown = read_run(folder).timeline.clients
    assert set(shown) == {"0", "1", "2", "3"}
    states = [s.state for s in shown["2"] if s.state != "idle"]
    assert states == ["download", "compute", "upload"] * 2
    assert (folder / "plots/timeline.png").exists()


def test_a_refused_payload_is_left_out_and_the_others_count(tmp_path, monkeypatch):
    one = make_federation(tmp_path, *SPARSE, *EDGES, "clients.per_round=4")
    damage_first(monkeypatch)
    row, _ = one.run_round()
    assert row["num_failed"] == 2 and row["num_clients"] == 2  # the first client of each edge
    assert all("checksum" in failure for failure in row["failures"].values())


def test_a_round_with_nobody_left_keeps_the_model(tmp_path, monkeypatch):
    one = make_federation(tmp_path, *SPARSE, *EDGES, "clients.per_round=2")
    one.clients.pictures_of = [indices[:0] for indices in one.clients.pictures_of]
    before = one.server.sha256()
    row, rows = one.run_round()
    assert row["num_clients"] == 0 and row["train_loss"] is None and row["num_failed"] == 2
    assert one.server.sha256() == before and {r.direction for r in rows} == {"down"}


def test_a_client_counts_edge_rounds(tmp_path):
    words = ["schedule.edge_rounds=2", "local.lr_schedule.name=exponential", "local.lr=0.08"]
    one = make_federation(tmp_path, *DENSE, *EDGES, *words, "local.lr_schedule.gamma=0.5")
    assert [one.run_round()[0]["lr"] for _ in range(2)] == [0.04, 0.01]


@pytest.mark.parametrize("budget", [1.0, 1e-9], ids=["in memory", "on the disk"])
def test_a_stop_between_edge_rounds_undoes_the_whole_round(tmp_path, monkeypatch, budget):
    words = [*SPARSE, *EDGES, "schedule.edge_rounds=3", f"clients.state_memory_gib={budget}"]
    one = make_federation(tmp_path, *words, name="stopped")
    other = make_federation(tmp_path, *words, name="whole")
    one.run_round(), other.run_round()
    before = {c: one.clients.store.get(c)["residual"].clone() for c in one.clients.store.versions}
    calls, train = [], Clients._train_one

    def stop(self, *rest):
        if calls.append(1) or len(calls) == 4:
            raise Interrupted
        return train(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Clients, "_train_one", stop)
        with pytest.raises(Interrupted):
            one.run_round()
    for client, residual in before.items():
        assert torch.equal(one.clients.store.get(client)["residual"], residual)
    for _ in range(2):
        one.run_round(), other.run_round()
    assert one.server.sha256() == other.server.sha256()


def test_a_killed_run_goes_on_to_the_same_end(run, monkeypatch):
    words = [*SPARSE, *EDGES, "schedule.edge_rounds=2", "rounds=5", "network.jitter_ms=20"]
    _, whole = run(*words, name="whole")
    killed = killed_before_logging(run, monkeypatch, 4, *words)
    assert summary(killed)["model_sha256"] == summary(whole)["model_sha256"]
    assert (killed / "ledger.csv").read_text() == (whole / "ledger.csv").read_text()
    up = sum(int(row["bytes"]) for row in ledger(whole) if row["direction"] == "up")
    assert up == summary(whole)["bytes_up"] and len(rounds(whole)) == 5
