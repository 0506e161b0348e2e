"""semi_synchronous.py: everybody trains for the same time, by closed forms and brute force."""

import numpy as np
import pytest
from helpers.runs import killed_before_logging, make_federation, summary

from config import ConfigError, Local
from federation.semi_synchronous import steps_of
from training.local_sgd import batch_sizes

WORDS = ["schedule.name=semi_synchronous", "clients.total=4", "clients.per_round=4"]
WORDS += ["data.partition.name=iid", "local.batch_size=16", "local.steps=2"]


def clients_file(tmp_path, *ms_per_example) -> str:
    path = tmp_path / "clients.csv"
    heading = "uplink_mbps,downlink_mbps,latency_ms,ms_per_example\n"
    path.write_text(heading + "".join(f"1e6,1e6,0,{ms}\n" for ms in ms_per_example))
    return f"network.clients_file={path}"


def test_steps_are_all_that_a_budget_of_examples_holds():
    rng = np.random.default_rng(0)
    for num in rng.integers(1, 40, 300).tolist():
        local = Local(batch_size=int(rng.integers(1, 12)), epochs=3)
        budget = float(rng.uniform(0, 200))
        steps = 1
        while sum(batch_sizes(Local(batch_size=local.batch_size, steps=steps + 1), num)) <= budget:
            steps += 1
        assert steps_of(local, num, budget) == steps
    assert steps_of(Local(batch_size=4), 10, 3 * 0.1 * 100) == 9  # 30.000000000000004 examples


def test_the_slowest_client_sets_the_period_and_all_train_for_as_long(tmp_path):
    one = make_federation(tmp_path, *WORDS, clients_file(tmp_path, 80, 40, 20, 27))
    assert one.clients.config.local.client_steps == [2, 4, 8, 5]
    assert one.workload.num_trained.tolist() == [32, 64, 128, 80]
    row, _ = one.run_round()
    assert row["num_clients"] == 4 and row["simulated_seconds"] == pytest.approx(2.56, abs=0.01)
    assert row["waited_seconds"] < 0.4 + 0.03  # only client 3 waits, for less than a batch


def test_who_lacks_the_memory_does_not_set_the_period(tmp_path):
    path = tmp_path / "clients.csv"
    rows = [f"1e6,1e6,0,{ms},{memory}\n" for ms, memory in ((20, 1), (10, 1), (10, 1), (500, 1e-5))]
    path.write_text(
        "uplink_mbps,downlink_mbps,latency_ms,ms_per_example,memory_gib\n" + "".join(rows)
    )
    words = [*WORDS, f"network.clients_file={path}", "clients.per_round=3"]
    one = make_federation(tmp_path, *words)
    assert one.candidates.tolist() == [0, 1, 2]
    assert one.clients.config.local.client_steps[:3] == [2, 4, 4]


def test_the_full_gradient_of_scaffold_is_part_of_the_period(tmp_path):
    words = [*WORDS, clients_file(tmp_path, 20, 10, 10, 10), "local.algorithm=SCAFFOLD"]
    one = make_federation(tmp_path, *words, "local.options.option=1")
    seconds = one.workload.num_trained * np.array([0.02, 0.01, 0.01, 0.01])
    assert (seconds <= seconds[0] * (1 + 1e-9)).all() and (seconds > seconds[0] - 0.17).all()


def test_a_period_may_be_set(tmp_path):
    words = [*WORDS, clients_file(tmp_path, 80, 40, 20, 10), "schedule.period_seconds=0.64"]
    one = make_federation(tmp_path, *words)
    assert one.clients.config.local.client_steps == [1, 1, 2, 4]  # nobody trains less than one


def test_alike_devices_make_it_synchronous(tmp_path):
    same = clients_file(tmp_path, 5, 5, 5, 5)
    one = make_federation(tmp_path, *WORDS, same, name="semi")
    two = make_federation(tmp_path, *WORDS, same, "schedule.name=synchronous", name="sync")
    for _ in range(2):
        one.run_round(), two.run_round()
    assert one.server.sha256() == two.server.sha256() and one.clock.now == two.clock.now


def test_a_killed_run_goes_on_to_the_same_end(run, tmp_path, monkeypatch):
    words = [*WORDS, clients_file(tmp_path, 30, 10, 20, 27), "rounds=4"]
    _, whole = run(*words, name="whole")
    killed = killed_before_logging(run, monkeypatch, 3, *words)
    assert summary(killed)["model_sha256"] == summary(whole)["model_sha256"]
    assert (killed / "ledger.csv").read_text() == (whole / "ledger.csv").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["schedule.deadline_seconds=3"], "deadline_seconds: semi_synchronous waits for all"),
        (["schedule.over_selection=2"], "over_selection: semi_synchronous waits for all"),
        (["local.client_steps=[2]"], "local.client_steps: semi_synchronous chooses them"),
        (["network.ms_per_example=0"], "network.ms_per_example: in semi_synchronous it must be"),
        (["schedule.period_seconds=0"], "schedule.period_seconds: 0.0 is out of range"),
        (["schedule.period_seconds=0.01"], "0.01 s are too few for every client; the fastest one"),
        (["schedule.name=synchronous", "schedule.period_seconds=1"], "goes with schedule.name"),
    ],
)
def test_bad_input_is_refused(tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        make_federation(tmp_path, *WORDS, *words)
