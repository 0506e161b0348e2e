"""buffered.py: FedBuff and FedAsync against plain sums, and against the synchronous schedule."""

import pytest
import torch
from helpers.runs import make_federation, note_what_is_owed, summary

from bandwidth_analysis import read_run
from config import ConfigError
from federation.client import Clients
from run_folder import RunFolder
from training.local_sgd import Interrupted

DENSE = ["pruning.method=none", "uplink.values=fp32", "uplink.error_feedback=false"]
SLOW = ["network.spread=1", "network.uplink_mbps=1"]
BUFFER = ["schedule.name=fedbuff", "clients.total=8", "clients.per_round=4", "schedule.buffer=2"]
ASYNC = ["schedule.name=fedasync", "clients.total=8", "clients.per_round=4"]


def ends(run, *words, name="a"):
    status, folder = run(*words, name=name)
    assert status == 0
    read_run(folder)  # which compares the rounds with the ledger
    return summary(folder), (folder / "ledger.csv").read_text()


def test_a_full_buffer_without_staleness_is_synchronous_fedavg(tmp_path):
    """All clients are equally fast, and there are as many as the buffer holds."""
    words = [*DENSE, "clients.total=4", "clients.per_round=3", "data.partition.name=iid"]
    words += ["local.batch_size=16", "local.steps=2"]
    one = make_federation(tmp_path, *words, name="synchronous")
    two = make_federation(
        tmp_path, *words, "schedule.name=fedbuff", "schedule.buffer=3", name="fedbuff"
    )
    for _ in range(3):
        (expected, _), (found, _) = one.run_round(), two.run_round()
        assert found["staleness"] == 0 and found["num_clients"] == expected["num_clients"] == 3
        models = two.server.parameters, one.server.parameters
        torch.testing.assert_close(*models, rtol=1e-6, atol=1e-6)
        assert found["simulated_seconds"] == pytest.approx(expected["simulated_seconds"])


def used_by(one, monkeypatch) -> list:
    """Fills up, step by step, with (round in which it began, its update) of what is averaged."""
    used, average = [], one._average
    channel = one.server.agreement.channel("up", "update")

    def note(flights, round_number):
        for flight in flights:
            [sent] = [m.payload for m in flight.report.messages if m.kind == "update"]
            decoded = channel.decode(sent, flight.round_number, flight.report.client)
            used.append((flight.round_number, decoded.dense()))
        return average(flights, round_number)

    monkeypatch.setattr(one, "_average", note)
    return used


def test_updates_are_discounted_by_how_often_the_server_has_stepped_since(tmp_path, monkeypatch):
    words = [*DENSE, *SLOW, *BUFFER, "server.optimizer=FedAvg", "server.weighting=uniform"]
    one = make_federation(tmp_path, *words, "schedule.staleness_power=1")
    used, ages = used_by(one, monkeypatch), set()
    for round_number in range(1, 9):
        before = one.server.parameters.detach().clone()
        used.clear()
        row, _ = one.run_round()
        stale = [round_number - begun for begun, _ in used]
        expected = sum(update / (1 + s) for s, (_, update) in zip(stale, used, strict=True)) / 2
        moved = one.server.parameters.detach() - before
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)
        assert row["staleness"] == sum(stale) / 2
        ages |= set(stale)
    assert min(ages) == 0 and max(ages) >= 2


def test_fedasync_mixes_the_models_of_clients_into_its_own(tmp_path, monkeypatch):
    words = [*DENSE, *SLOW, *ASYNC, "server.optimizer=FedAvg"]
    one = make_federation(tmp_path, *words, "schedule.mixing=0.5", "schedule.staleness_power=1")
    used, models = used_by(one, monkeypatch), {}
    for round_number in range(1, 9):
        before = models[round_number] = one.server.parameters.detach().clone()
        used.clear()
        one.run_round()
        [(begun, update)] = used
        share = 0.5 / (1 + round_number - begun)
        expected = (1 - share) * before + share * (models[begun] + update)
        torch.testing.assert_close(one.server.parameters.detach(), expected, rtol=1e-4, atol=1e-6)
    assert len(one.models) <= 4  # those that somebody under way began with


KILLS = {"while clients train": (Clients, "_begin"), "before it is logged": (RunFolder, "append")}


@pytest.mark.parametrize("schedule", [BUFFER, ASYNC], ids=["fedbuff", "fedasync"])
@pytest.mark.parametrize("where", KILLS)
def test_a_killed_run_goes_on_to_the_same_end(run, monkeypatch, schedule, where):
    words = [*SLOW, *schedule, "rounds=8", "checkpoint.every=3", "network.availability.dropout=0.2"]
    words += ["uplink.error_feedback=true", "model.name=resnet18", "model.width=0.0625"]
    words += ["network.server_ingress_mbps=2", "network.jitter_ms=30"]
    whole = ends(run, *words, name="whole")
    owner, name = KILLS[where]
    original, calls = getattr(owner, name), []

    def fail(self, *args):
        calls.append(1)
        if len(calls) == 6:
            raise MemoryError
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(MemoryError):
            run(*words, name="killed")
    killed = ends(run, *words, name="killed")
    assert killed[0]["model_sha256"] == whole[0]["model_sha256"] and killed[1] == whole[1]


def test_an_interrupted_round_never_happened(tmp_path, monkeypatch):
    words = [*SLOW, *BUFFER, "uplink.error_feedback=true"]
    one, two = (make_federation(tmp_path, *words, name=name) for name in ("one", "two"))
    for federation in (one, two):
        federation.run_round()
    original, calls = Clients._begin, []

    def stop(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Clients, "_begin", stop)
        for _ in range(3):
            try:
                two.run_round()
                one.run_round()
            except Interrupted:
                break
    assert len(calls) == 2
    for _ in range(3):
        one.run_round()
        two.run_round()
    assert one.server.sha256() == two.server.sha256() and one.clock.now == two.clock.now


@pytest.mark.parametrize("speed", ["network.ms_per_example=5", "network.ms_per_example=5000"])
def test_a_client_that_leaves_owes_all_that_it_would_have_sent(tmp_path, monkeypatch, speed):
    """Whether it leaves in the round in which it began or later: nothing of it has arrived."""
    words = [*BUFFER, "uplink.error_feedback=true", "network.availability.dropout=1", speed]
    one = make_federation(tmp_path, *words)
    owed = note_what_is_owed(one, monkeypatch)
    for _ in range(3):
        row, _ = one.run_round()
        assert row["num_late"] > 0 and row["num_clients"] == 0
        for client in {*owed} - {*one.flights}:
            residual = one.clients.store.get(client)["residual"]
            torch.testing.assert_close(residual, owed[client], rtol=1e-5, atol=1e-7)


def test_a_client_whose_update_waits_in_the_buffer_does_not_begin_again(tmp_path):
    """All clients end at once, and each step takes one: the others wait."""
    words = ["schedule.name=fedbuff", "clients.total=4", "clients.per_round=4", *DENSE]
    one = make_federation(tmp_path, *words, "schedule.buffer=1", "data.partition.name=iid")
    for _ in range(6):
        _, rows = one.run_round()
        waiting = [flight.report.client for flight in one.buffer]
        assert len(set(waiting)) == len(waiting)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["schedule.deadline_seconds=3"], "schedule.deadline_seconds: fedbuff waits for no round"),
        (["schedule.concurrency=9"], "schedule.concurrency: more than clients.total=8 clients"),
        (["downlink.mode=change"], "downlink.mode: with fedbuff clients begin at any time"),
        (["local.algorithm=SCAFFOLD"], "local.algorithm: fedbuff takes FedAvg and FedProx"),
        (["pruning.mask.method=snip"], "pruning.mask.method: a mask changes between rounds"),
        (["distributed.exchange=allreduce"], "distributed.exchange: fedbuff keeps payloads"),
    ],
)
def test_what_needs_rounds_is_refused(tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        make_federation(tmp_path, *BUFFER, *words)
