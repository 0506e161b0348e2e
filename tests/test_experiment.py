"""Whole runs in one process: what they leave behind, kills, interrupts, and what they say."""

import json
import pkgutil
import shutil
import signal
import subprocess
import threading

import numpy as np
import pytest
import torch
from helpers.run_folders import PLOT_NAMES_OF_COLUMNS, PLOT_NAMES_OF_ONE_RUN
from helpers.runs import PYTHON, REPOSITORY, SCRIPTS, launch, summary, tiny_command

from federation import client
from federation.uplink import Uplink
from run_folder import RunFolder


def test_a_run_leaves_every_file_of_the_run_folder(run):
    status, folder = run("trackers=[tensorboard]", draws=True)
    assert status == 0
    for name in ("config.yaml", "environment.json", "rounds.jsonl", "ledger.csv", "checkpoint.pt"):
        assert (folder / name).stat().st_size > 0
    plots = {path.name for path in (folder / "plots").iterdir()}
    assert plots == {*PLOT_NAMES_OF_ONE_RUN, *PLOT_NAMES_OF_COLUMNS}
    assert list((folder / "tensorboard").iterdir())
    result = summary(folder)
    assert result["dataset"] == "digits" and result["model"] == "lenet"
    assert result["num_clients"] == 4 and result["rounds_completed"] == 4
    assert len(result["model_sha256"]) == 64
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    last = [row["test_accuracy"] for row in rows]
    assert result["test_accuracy"] == last[-1]
    assert result["test_accuracy_mean"] == pytest.approx(np.mean(last))
    assert result["test_accuracy_mean_over"] == 4
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["dataset"]["name"] == "digits" and environment["precision"] == "fp32"
    assert environment["settled"] == []
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["progress"]["round_number"] == 4


class Killed(BaseException):
    """Ends a run on the spot, past every except Exception."""


STORE = "federation.client_store.ClientStore."

# Where a kill may fall: (what to break, which call of it is the last, settings)
KILLS = {
    "in round 1, before any checkpoint": ("federation.client.Clients._begin", 2),
    "between two checkpoints": ("federation.client.Clients._begin", 8),
    "while a client's state goes to the disk": ("federation.client_store.write_tensors", 3),
    "before the round is logged": ("run_folder.RunFolder.append", 3),
    "before the clients' states are saved": (STORE + "save", 1),
    "between the clients' states and the checkpoint": ("run_folder.RunFolder.save", 1),
    "before the last checkpoint": ("run_folder.RunFolder.save", 2),
    "before old states are removed": (STORE + "drop_replaced", 2, "checkpoint.every=1"),
    "before the summary": ("run_folder.RunFolder.finish", 1),
}


@pytest.mark.parametrize("budget", [1.0, 1e-9], ids=["in memory", "on the disk"])
@pytest.mark.parametrize("where", KILLS)
def test_a_run_killed_anywhere_resumes_to_the_same_end(run, monkeypatch, where, budget):
    _, whole = run(name="whole")
    target, last_call, *words = KILLS[where]
    words.append(f"clients.state_memory_gib={budget}")
    calls = 0

    def break_at(original):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == last_call:
                raise Killed
            return original(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(target, break_at(pkgutil.resolve_name(target)))
        with pytest.raises(Killed):
            run(*words, name="killed")
    status, killed = run(*words, name="killed")
    assert status == 0
    assert summary(killed)["model_sha256"] == summary(whole)["model_sha256"]
    assert (killed / "ledger.csv").read_text() == (whole / "ledger.csv").read_text()
    assert summary(killed)["simulated_seconds"] == summary(whole)["simulated_seconds"]
    assert not (killed / "clients").exists()


def test_a_rank_that_leaves_the_last_checkpoint_late_misses_no_states(run, monkeypatch):
    """Once the last checkpoint stands, rank 0 deletes all clients' states without waiting."""
    save, deleted = RunFolder.save, []

    def save_then_finish(self, config, state):
        save(self, config, state)
        if state["progress"]["round_number"] == 4:
            deleted.extend(self.clients.glob("*.pt"))
            shutil.rmtree(self.clients)

    monkeypatch.setattr(RunFolder, "save", save_then_finish)
    status, folder = run("uplink.error_feedback=true")
    assert status == 0 and deleted and (folder / "summary.json").exists()


def test_an_interrupt_writes_a_checkpoint_and_the_same_command_goes_on(run, monkeypatch, capsys):
    _, whole = run(name="whole")
    original = client.train_client
    calls = 0

    def train(*args):
        nonlocal calls
        calls += 1
        if calls == 5:  # in the middle of round 2
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(client, "train_client", train)
        status, folder = run(name="stopped")
    assert status == 130
    assert "interrupted" in capsys.readouterr().err
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["progress"]["round_number"] == 1
    assert run(name="stopped")[0] == 0
    assert summary(folder)["model_sha256"] == summary(whole)["model_sha256"]


def test_a_run_says_who_was_left_out(run, capsys):
    status, _ = run("local.lr=1e30", "rounds=1")
    assert status == 3
    said = capsys.readouterr().err
    assert "round 1: 3 clients left out; client " in said and "the update is not finite" in said


def test_a_finished_run_says_so_with_several_ranks_too(run, tmp_path):
    assert run()[0] == 0
    torchrun = [str(SCRIPTS / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    again = launch(*torchrun, *tiny_command(tmp_path))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is finished: ") == 1 and "error" not in again.stderr


# --- ornaments, and where main() is called from ---------------------------------------------------


def broken(*_, **__):
    raise RuntimeError("it is out of order\nand says so at length")


@pytest.mark.parametrize(
    ("what", "target"),
    [
        ("plots", "experiment.write_plots"),
        ("plots", "experiment.read_run"),
        ("trackers", "accelerate.Accelerator.log"),
        ("trackers", "accelerate.Accelerator.init_trackers"),
        ("trackers", "accelerate.Accelerator.end_training"),
    ],
)
def test_plots_and_trackers_never_change_the_exit_status(run, monkeypatch, capsys, what, target):
    monkeypatch.setattr(target, broken)
    status, folder = run(draws=True)
    assert status == 0 and summary(folder)["rounds_completed"] == 4
    assert f"warning: {what} left out: it is out of order\n" in capsys.readouterr().err


def test_a_run_in_another_thread(run):
    """Signals can be handled in the main thread only; a notebook may use another."""
    results = []
    thread = threading.Thread(target=lambda: results.append(run(draws=True)))
    thread.start()
    thread.join()
    assert results[0][0] == 0


@pytest.mark.parametrize("words", [[], ["--dry_run"]])
def test_a_reader_who_leaves_early_does_not_end_the_run(tmp_path, words):
    command = [PYTHON, *tiny_command(tmp_path), *words]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0 and errors == ""
    assert words or summary(tmp_path / "tiny-s1")["rounds_completed"] == 4


# --- rounds of nothing ----------------------------------------------------------------------------


@pytest.fixture
def all_fail(monkeypatch):
    """Every client's update is lost."""
    original = Uplink.encode

    def encode(self, *update):
        report = original(self, *update)
        report.fail("it fell over")
        return report

    monkeypatch.setattr(Uplink, "encode", encode)


def test_a_run_that_learned_nothing_ends_with_a_status_of_its_own(run, all_fail, capsys):
    status, folder = run("rounds=3")
    assert status == 3
    assert summary(folder)["num_failed"] == 9
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no client's update could be used in 3 rounds in a row" in error
    assert "it fell over" in error and "local.lr" in error
    assert run("rounds=3")[0] == 3
    assert "is finished" in capsys.readouterr().out


def test_rounds_of_nothing_end_a_long_run_with_a_checkpoint(run, all_fail):
    status, folder = run("rounds=50")
    assert status == 3 and not (folder / "summary.json").exists()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["progress"]["round_number"] == state["progress"]["empty_rounds"] == 5


def test_a_learning_rate_that_is_far_too_large_does_not_end_well(run):
    assert run("local.lr=1e30", "local.steps=5", "pruning.method=none")[0] == 3


def test_the_summary_counts_what_was_left_out(run, monkeypatch):
    original = Uplink.encode

    def encode(self, *update):
        report = original(self, *update)
        if report.client == 1:
            report.fail("it fell over")
        return report

    monkeypatch.setattr(Uplink, "encode", encode)
    status, folder = run("clients.per_round=4")
    assert status == 0 and summary(folder)["num_failed"] == 4
