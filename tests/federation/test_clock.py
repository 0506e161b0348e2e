"""clock.py: for whom the server waits, and what the ledger says of the others."""

import pytest
from helpers.runs import killed_before_logging, ledger, make_federation, rounds, summary

from config import ConfigError


def clients_file(tmp_path) -> str:
    """Client 0 is the fastest, and each one after it trains a second longer."""
    rows = ["uplink_mbps,downlink_mbps,latency_ms,ms_per_example"]
    rows += [f"100,100,0,{1000 * (client + 1) / 32}" for client in range(6)]
    path = tmp_path / "clients.csv"
    path.write_text("\n".join(rows))
    return f"network.clients_file={path}"


WORDS = ["clients.total=6", "clients.per_round=3", "local.steps=2", "local.batch_size=16"]
WORDS += ["uplink.error_feedback=true"]


def test_the_fastest_of_an_over_selected_cohort_count(run, tmp_path):
    status, folder = run(*WORDS, clients_file(tmp_path), "schedule.over_selection=2", "rounds=2")
    assert status == 0
    for row in rounds(folder):
        assert row["num_clients"] == 3 and row["num_late"] == 3 and row["num_failed"] == 0
        assert row["simulated_seconds"] == pytest.approx(3, abs=0.2)  # the third client's training
    updates = [row for row in ledger(folder) if row["kind"] == "update"]
    assert {row["sender"] for row in updates} == {"0", "1", "2"}
    down = [row for row in ledger(folder) if row["kind"] == "model"]
    assert len(down) == 12  # everybody got the model, and half of them for nothing
    assert summary(folder)["num_failed"] == 0


def test_a_deadline_ends_a_round_and_what_is_late_is_owed(tmp_path):
    words = [*WORDS, clients_file(tmp_path), "clients.per_round=6", "schedule.deadline_seconds=4.5"]
    one = make_federation(tmp_path, *words, "pruning.density=0.01")
    row, rows = one.run_round()
    assert row["num_clients"] == 4 and row["num_late"] == 2
    assert row["simulated_seconds"] == pytest.approx(4.5)
    assert {message.sender for message in rows if message.kind == "update"} == {"0", "1", "2", "3"}
    on_time, late = one.clients.store.get(0)["residual"], one.clients.store.get(5)["residual"]
    update_size = one.model.layout.size
    assert (late != 0).sum() > (on_time != 0).sum() > 0.5 * update_size
    row, _ = one.run_round()
    assert one.progress.simulated_seconds == pytest.approx(9)


def test_what_is_cut_off_counts_with_the_bytes_that_had_arrived(tmp_path):
    path = tmp_path / "clients.csv"
    path.write_text("uplink_mbps,downlink_mbps,latency_ms,ms_per_example\n" + "0.1,100,0,1\n" * 6)
    words = ["schedule.deadline_seconds=1", "pruning.method=none", "uplink.values=fp32"]
    one = make_federation(tmp_path, *WORDS, f"network.clients_file={path}", *words)
    row, rows = one.run_round()
    cut = [message for message in rows if message.direction == "up"]
    assert row["num_late"] == 3 and row["num_clients"] == 0 and len(cut) == 3
    for message in cut:
        assert 0 < message.bytes < 0.1e6 / 8 and message.num_values == message.dense_bytes == 0
        assert message.start + message.seconds == pytest.approx(1)


def test_a_deadline_that_nobody_can_meet_is_refused(tmp_path):
    words = [*WORDS, clients_file(tmp_path), "schedule.deadline_seconds=0.5"]
    with pytest.raises(ConfigError, match="deadline_seconds: 0.5 s are too few for every client"):
        make_federation(tmp_path, *words)


def test_who_drops_out_is_late(run):
    words = ["network.availability.dropout=0.5", "clients.per_round=4", "rounds=8"]
    status, folder = run(*words)
    late = [row["num_late"] for row in rounds(folder)]
    assert status == 0 and 4 < sum(late) < 28
    assert all(row["num_clients"] + row["num_late"] == 4 for row in rounds(folder))


def test_nobody_is_sampled_who_is_not_there(tmp_path):
    path = tmp_path / "there.csv"
    path.write_text("client,from,to\n1,5,1000\n2,5,1000\n3,2000,9000\n")
    words = ["network.availability.name=trace", f"network.availability.file={path}"]
    one = make_federation(tmp_path, *words, "clients.per_round=2")
    _, rows = one.run_round()
    assert {row.receiver for row in rows if row.direction == "down"} == {"1", "2"}
    assert min(row.start for row in rows) == 5  # until then nobody is there
    one.clock.simulation.advance(until=3000)
    _, rows = one.run_round()
    assert {row.receiver for row in rows if row.direction == "down"} == {"3"}
    one.clock.simulation.advance(until=9500)
    with pytest.raises(ConfigError, match="no client ever comes again"):
        one.run_round()


@pytest.mark.parametrize("schedule", ["over_selection=2", "deadline_seconds=4.5"])
def test_a_killed_run_goes_on_to_the_same_end(run, tmp_path, monkeypatch, schedule):
    words = [*WORDS, clients_file(tmp_path), f"schedule.{schedule}", "rounds=5"]
    words += ["network.availability.name=diurnal", "network.availability.period_hours=0.01"]
    _, whole = run(*words, name="whole")
    killed = killed_before_logging(run, monkeypatch, 4, *words)
    assert summary(killed)["model_sha256"] == summary(whole)["model_sha256"]
    assert (killed / "ledger.csv").read_text() == (whole / "ledger.csv").read_text()
