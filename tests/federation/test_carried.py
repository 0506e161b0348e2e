"""carried.py: late updates count when they arrive, against a simulation by hand."""

import numpy as np
import pytest
import torch
from helpers.runs import (
    killed_before_logging,
    make_federation,
    make_plain_federation,
    note_what_is_owed,
    rounds,
    summary,
)

from bandwidth_analysis import read_run
from config import ConfigError
from federation.client import Clients
from training.local_sgd import Interrupted

CARRY = ["schedule.late=carry", "clients.total=6", "clients.per_round=3", "local.steps=1"]
CARRY += ["data.partition.name=iid", "local.batch_size=16"]


def clients_file(tmp_path, seconds) -> str:
    """Clients that train for so many seconds; their messages take next to no time."""
    path = tmp_path / "clients.csv"
    heading = "uplink_mbps,downlink_mbps,latency_ms,ms_per_example\n"
    path.write_text(heading + "".join(f"1e9,1e9,0,{1000 * s / 16}\n" for s in seconds))
    return f"network.clients_file={path}"


def note_updates(one, monkeypatch) -> list:
    """Fills up with (round, client, its update) of all that train."""
    noted, encode = [], one.clients.uplink.encode

    def note(trained, round_number, *rest):
        noted.append((round_number, trained.report.client, trained.update.clone()))
        return encode(trained, round_number, *rest)

    monkeypatch.setattr(one.clients.uplink, "encode", note)
    return noted


@pytest.mark.parametrize("seed", range(3))
def test_each_update_counts_in_the_round_in_whose_time_it_arrives(tmp_path, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    seconds, deadline = rng.uniform(1, 12, 6), 4.0 + seed
    words = [*CARRY, clients_file(tmp_path, seconds), f"schedule.deadline_seconds={deadline}"]
    one = make_plain_federation(tmp_path, *words, "schedule.staleness_power=0.7")
    noted = note_updates(one, monkeypatch)
    begin, under_way, carried = 0.0, [], 0
    for round_number in range(1, 13):
        before = one.server.parameters.detach().clone()
        noted.clear()
        busy = {client for _, client, _, _ in under_way}
        row, _ = one.run_round()
        cohort = {client for _, client, _ in noted}
        assert not cohort & busy and len(cohort) == min(3, 6 - len(busy))
        under_way += [(n, c, begin + seconds[c], update) for n, c, update in noted]
        ends = [end for n, _, end, _ in under_way if n == round_number]
        begin = min(begin + deadline, max(ends, default=np.inf))
        arrived = [flight for flight in under_way if flight[2] <= begin + 1e-9]
        under_way = [flight for flight in under_way if flight[2] > begin + 1e-9]
        assert row["num_clients"] == len(arrived) and row["num_late"] == row["num_failed"] == 0
        assert one.clock.now == pytest.approx(begin, abs=1e-3)
        late = [round_number - n for n, _, _, _ in arrived if n < round_number]
        assert row["num_carried"] == len(late)
        assert row["staleness"] == pytest.approx(sum(late) / max(1, len(late)))
        carried += len(late)
        weights = [len(one.shards[c]) for _, c, _, _ in arrived]
        expected = torch.zeros_like(before)
        for weight, (n, _, _, update) in zip(weights, arrived, strict=True):
            expected += weight / sum(weights) * (1 + round_number - n) ** -0.7 * update
        moved = one.server.parameters.detach() - before
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)
    assert carried >= 3


def test_where_nobody_is_late_it_is_the_synchronous_schedule(tmp_path):
    words = [*CARRY, "schedule.deadline_seconds=1000", "uplink.error_feedback=true"]
    one = make_federation(tmp_path, *words, "network.spread=1", name="carry")
    words += ["network.spread=1", "schedule.late=drop"]
    two = make_federation(tmp_path, *words, name="drop")
    for _ in range(3):
        one.run_round(), two.run_round()
    assert one.server.sha256() == two.server.sha256() and one.clock.now == two.clock.now


def test_the_slowest_of_an_over_selected_cohort_follow(tmp_path):
    words = [*CARRY, clients_file(tmp_path, [1, 2, 3, 4, 5, 6]), "schedule.over_selection=2"]
    one = make_federation(tmp_path, *words, "schedule.deadline_seconds=1000")
    row, _ = one.run_round()
    assert row["num_clients"] == 3 and sorted(one.flights) == [3, 4, 5]
    row, _ = one.run_round()  # 0, 1 and 2 begin again; until second 6, the others arrive
    assert row["num_clients"] == 6 and row["num_carried"] == 3 and not one.flights


RUN = [*CARRY, "schedule.deadline_seconds=0.4", "network.spread=1", "network.jitter_ms=30"]
RUN += ["uplink.error_feedback=true", "network.availability.dropout=0.2", "rounds=8"]
RUN += ["network.uplink_mbps=0.2", "network.server_ingress_mbps=0.5", "checkpoint.every=3"]


def test_a_killed_run_goes_on_to_the_same_end(run, monkeypatch):
    words = [*RUN, "model.name=resnet18", "model.width=0.0625", "network.ms_per_example=10"]
    _, whole = run(*words, name="whole")
    killed = killed_before_logging(run, monkeypatch, 6, *words)
    assert summary(killed)["model_sha256"] == summary(whole)["model_sha256"]
    read_run(killed)  # which compares the rounds with the ledger
    assert (killed / "ledger.csv").read_text() == (whole / "ledger.csv").read_text()
    assert sum(row["num_carried"] for row in rounds(whole)) > 0


def test_an_interrupted_round_never_happened(tmp_path, monkeypatch):
    words = [*RUN, "network.uplink_mbps=0.02"]
    one, two = (make_federation(tmp_path, *words, name=name) for name in ("one", "two"))
    for federation in (one, two):
        federation.run_round(), federation.run_round()
    assert two.flights
    begin, calls = Clients._begin, []

    def stop(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted
        return begin(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Clients, "_begin", stop)
        with pytest.raises(Interrupted):
            two.run_round()
    for federation in (one, two):
        federation.run_round(), federation.run_round()
    assert one.server.sha256() == two.server.sha256() and one.clock.now == two.clock.now


@pytest.mark.parametrize("mbps", [10, 0.02])
def test_a_client_that_leaves_owes_all_that_it_would_have_sent(tmp_path, monkeypatch, mbps):
    """Whether it leaves in the round in which it began or later."""
    words = [*RUN, "network.availability.dropout=1", f"network.uplink_mbps={mbps}"]
    words += ["network.jitter_ms=0"]
    one, lost = make_federation(tmp_path, *words), 0
    owed = note_what_is_owed(one, monkeypatch)
    for _ in range(6):
        row, _ = one.run_round()
        assert row["num_clients"] == 0
        lost += row["num_late"]
        for client in {*owed} - {*one.flights}:
            residual = one.clients.store.get(client)["residual"]
            torch.testing.assert_close(residual, owed[client], rtol=1e-5, atol=1e-7)
    assert lost > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["schedule.deadline_seconds=null"], "schedule.late: carry goes with name: synchronous"),
        (["schedule.name=fedbuff"], "schedule.late: carry goes with name: synchronous"),
        (["schedule.late=keep"], "schedule.late: 'keep' is not one of drop, carry"),
        (["pruning.mask.method=dynamic"], "a dynamic mask changes while late updates"),
        (["local.algorithm=SCAFFOLD"], "carry takes FedAvg, FedProx and FedNova"),
        (["distributed.exchange=allreduce"], "carry keeps payloads; use gather"),
    ],
)
def test_what_needs_all_updates_in_their_round_is_refused(tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        make_federation(tmp_path, *RUN, *words)
