"""Whole runs in one process: the run folder, resuming, interrupting, and clients that fail."""

import json
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.runs import REPOSITORY, TINY, ledger, make_federation, summary

from command_line import load_config
from distributed import Ranks
from federation import channel
from federation import client as trainer
from federation.synchronous import Federation
from run_folder import RunFolder


def test_a_run_leaves_every_file_of_the_run_folder(run):
    status, folder = run("trackers=[tensorboard]")
    assert status == 0
    for name in ("config.yaml", "environment.json", "rounds.jsonl", "ledger.csv", "checkpoint.pt"):
        assert (folder / name).stat().st_size > 0
    assert len(list((folder / "plots").glob("*.png"))) == 4
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
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["progress"]["round"] == 4


def test_ledger_is_the_lengths_of_the_payloads_that_were_decoded(run, monkeypatch):
    decoded = []

    def recording(payload, layout):
        decoded.append(len(payload))
        return decode(payload, layout)

    decode = channel.decode
    monkeypatch.setattr(channel, "decode", recording)
    _, folder = run()
    rows, result = ledger(folder), summary(folder)
    up = [int(row["bytes"]) for row in rows if row["direction"] == "up"]
    assert up == [n for i, n in enumerate(decoded) if i % 4]  # a round: the model, three updates
    for key, column in (("bytes", "bytes"), ("dense_bytes", "dense_bytes")):
        for direction in ("up", "down"):
            total = sum(int(row[column]) for row in rows if row["direction"] == direction)
            assert result[f"{key}_{direction}"] == total
    assert len(rows) == 4 * 3 * 2  # rounds, clients, one message each way
    assert result["dense_bytes_up"] == 4 * 3 * 4 * result["num_parameters"]
    assert all(int(r["nonzeros"]) <= 0.05 * 21686 + 1 for r in rows if r["direction"] == "up")


class Killed(BaseException):
    """Ends a run on the spot, past every except Exception."""


STORE = "client_store.ClientStore."

# Where a kill may fall: (module attribute to break, which call of it is the last, settings)
KILLS = {
    "in round 1, before any checkpoint": ("trainer.Trainer.train", 2),
    "between two checkpoints": ("trainer.Trainer.train", 8),
    "while a client's state goes to the disk": ("client_store.write_tensors", 3),
    "before the round is logged": ("runlog.RunFolder.append", 3),
    "before the clients' states are saved": (STORE + "save", 1),
    "between the clients' states and the checkpoint": ("runlog.RunFolder.save", 1),
    "before the last checkpoint": ("runlog.RunFolder.save", 2),
    "before old states are removed": (STORE + "drop_replaced", 2, "checkpoint.every=1"),
    "before the summary": ("runlog.RunFolder.finish", 1),
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
        patch.setattr(target, break_at(_find(target)))
        with pytest.raises(Killed):
            run(*words, name="killed")
    status, killed = run(*words, name="killed")
    assert status == 0
    assert summary(killed)["model_sha256"] == summary(whole)["model_sha256"]
    assert (killed / "ledger.csv").read_text() == (whole / "ledger.csv").read_text()
    assert summary(killed)["simulated_seconds"] == summary(whole)["simulated_seconds"]
    assert not (killed / "clients").exists()


def _find(target):
    module, *path = target.split(".")
    found = __import__(module)
    for name in path:
        found = getattr(found, name)
    return found


def test_a_rank_that_leaves_the_last_checkpoint_late_misses_no_states(run, monkeypatch):
    """Once the last checkpoint stands, rank 0 deletes all clients' states without waiting."""
    save, deleted = RunFolder.save, []

    def save_then_finish(self, state):
        save(self, state)
        if state["progress"]["round"] == 4:
            deleted.extend(self.clients.glob("*.pt"))
            shutil.rmtree(self.clients)

    monkeypatch.setattr(RunFolder, "save", save_then_finish)
    status, folder = run("uplink.error_feedback=true")
    assert status == 0 and deleted and (folder / "summary.json").exists()


def test_an_interrupt_writes_a_checkpoint_and_the_same_command_goes_on(run, monkeypatch, capsys):
    _, whole = run(name="whole")
    original = trainer.train_client
    calls = 0

    def train(*args):
        nonlocal calls
        calls += 1
        if calls == 5:  # in the middle of round 2
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_client", train)
        status, folder = run(name="stopped")
    assert status == 130
    assert "interrupted" in capsys.readouterr().err
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["progress"]["round"] == 1
    assert run(name="stopped")[0] == 0
    assert summary(folder)["model_sha256"] == summary(whole)["model_sha256"]


def test_a_finished_run_is_never_overwritten(run, capsys):
    _, folder = run()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run()[0] == 0
    assert "is finished" in capsys.readouterr().out
    assert run("checkpoint.resume=never")[0] == 0
    assert run("local.lr=0.01")[0] == 2
    assert "local.lr (0.05 there, 0.01 here)" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in before}


def test_resume_never_starts_again(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("runlog.RunFolder.finish", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run()
    seen = []
    original = Federation.run_round
    monkeypatch.setattr(
        Federation, "run_round", lambda self: seen.append(self.progress.round) or original(self)
    )
    assert run("checkpoint.resume=never")[0] == 0
    assert seen == [0, 1, 2, 3]


def test_two_processes_do_not_share_a_run_folder(tmp_path, run, capsys):
    config = load_config(
        REPOSITORY / "configs/default.yaml", [*TINY, f"output_dir={tmp_path}", "name=tiny"]
    )
    held = RunFolder(config.run_folder)
    held.start(config)
    assert run()[0] == 2
    assert "another process is running this" in capsys.readouterr().err


def test_error_feedback_conserves_what_clients_learned(tmp_path):
    """What the server gets plus what is still owed is what was learned, to the last bit."""
    one = make_federation(tmp_path, "clients.total=1", "clients.per_round=1")
    received = one.server.parameters.detach().clone()
    report = one.trainer.train(1, 0, one.server.broadcast(1, [0]))
    learned = one.model.read_parameters() - received
    sent = one.server.receive(report, 1)["update"].dense()
    residual = one.trainer.store.get_staged(0)["residual"]
    assert torch.equal(sent + residual, learned)
    assert 0 < report.numbers["update"] < 0.06 * len(learned)


def test_a_client_that_is_not_finite_is_left_out_and_counted(tmp_path, monkeypatch):
    def train(engine, *rest):
        if calls.append(1) or len(calls) == 2:  # the second client diverges
            engine.model.parameters.fill_(float("nan"))
            return float("nan"), 0
        return original(engine, *rest)

    calls, original = [], trainer.train_client
    monkeypatch.setattr(trainer, "train_client", train)
    one = make_federation(tmp_path)
    row = one.run_round()
    assert row["num_clients"] == 2 and row["num_failed"] == 1
    assert list(row["failures"].values()) == ["the update is not finite"]
    assert np.isfinite(row["train_loss"])
    assert torch.isfinite(one.server.parameters).all()
    assert len(one.trainer.store.versions) == 2


@pytest.mark.parametrize("budget", [1.0, 1e-9], ids=["in memory", "on the disk"])
def test_a_refused_payload_goes_back_into_the_residual(tmp_path, monkeypatch, budget):
    """A payload broken on its way costs a round's progress of a client, not what it learned."""
    one = make_federation(tmp_path, f"clients.state_memory_gib={budget}")
    exchange = Ranks.exchange

    def damage(self, reports):
        payload = bytearray(reports[0].payloads["update"])
        payload[40] ^= 1
        damaged = replace(reports[0], payloads={"update": bytes(payload)})
        return exchange(self, [damaged, *reports[1:]])

    monkeypatch.setattr(Ranks, "exchange", damage)
    cohort = one.sample_cohort(1)
    received = one.server.parameters.detach().clone()
    updates = {}
    for client in cohort:
        one.trainer.train(1, client, one.server.broadcast(1, cohort))
        updates[client] = one.model.read_parameters() - received
    one.trainer.store.discard()
    row = one.run_round()
    assert row["num_failed"] == 1
    assert "checksum" in row["failures"][str(cohort[0])]
    assert torch.equal(one.trainer.store.get(cohort[0])["residual"], updates[cohort[0]])
    assert not torch.equal(one.trainer.store.get(cohort[1])["residual"], updates[cohort[1]])
    rows = ledger(one.folder.path)
    assert len(rows) == 6  # the bytes that did travel are in the ledger


def test_a_round_with_nobody_left_keeps_the_model(tmp_path, monkeypatch):
    def diverge(engine, *_):
        engine.model.parameters.fill_(float("inf"))
        return float("nan"), 0

    monkeypatch.setattr(trainer, "train_client", diverge)
    one = make_federation(tmp_path)
    before = one.server.sha256()
    row = one.run_round()
    assert row["num_clients"] == 0 and row["train_loss"] is None
    assert one.server.sha256() == before


def test_a_loss_that_is_not_finite_is_logged_as_none(tmp_path, monkeypatch):
    """fp16's loss scaler skips such a step, so the update may be finite."""
    monkeypatch.setattr(trainer, "train_client", lambda *rest: (float("inf"), 0))
    row = make_federation(tmp_path).run_round()
    assert row["num_failed"] == 0 and row["train_loss"] is None


def test_a_run_says_who_was_left_out(run, capsys):
    status, _ = run("local.lr=1e30", "rounds=1")
    assert status == 0
    said = capsys.readouterr().err
    assert "round 1: 3 clients left out; client " in said and "the update is not finite" in said


def test_clients_train_from_what_they_decoded(tmp_path, monkeypatch):
    starts = []
    original = trainer.train_client

    def train(engine, *rest):
        starts.append(engine.model.read_parameters().clone())
        return original(engine, *rest)

    monkeypatch.setattr(trainer, "train_client", train)
    one = make_federation(tmp_path, "downlink.values=fp16")
    exact = one.server.parameters.detach().clone()
    one.run_round()
    assert torch.equal(starts[0], exact.half().float())
    assert not torch.equal(starts[0], exact)


def test_batchnorm_buffers_are_averaged_and_counted(tmp_path):
    one = make_federation(tmp_path, "model.name=resnet18", "model.width=0.125", "rounds=1")
    one.run_round()
    assert (one.server.buffers[one.server.is_counter] == 2).all()  # two steps a client
    kinds = {(row["direction"], row["kind"]) for row in ledger(one.folder.path)}
    assert kinds == {("down", "model"), ("down", "buffers"), ("up", "update"), ("up", "buffers")}
    names = one.model.buffer_layout.names
    bounds = one.model.buffer_layout.offsets
    for name, start, stop in zip(names, bounds[:-1], bounds[1:], strict=True):
        if name.endswith("running_var"):
            assert (one.server.buffers[start:stop] > 0).all()
