"""Rounds: what is sent is what is decoded and counted, and clients that fail are left out."""

import numpy as np
import pytest
import torch
from helpers.runs import (
    damage_first,
    kinds,
    ledger,
    make_federation,
    make_plain_federation,
    summary,
)

from config import ConfigError
from federation import channel, client
from federation.cohort import sample_cohort


def test_ledger_is_the_lengths_of_the_payloads_that_were_coded(run, monkeypatch):
    encoded, decoded, encode, decode = [], [], channel.encode, channel.decode

    def recording_encode(*task):
        payload, sent = encode(*task)
        encoded.append(len(payload))
        return payload, sent

    def recording_decode(payload, *agreed):
        decoded.append(len(payload))
        return decode(payload, *agreed)

    monkeypatch.setattr(channel, "encode", recording_encode)
    monkeypatch.setattr(channel, "decode", recording_decode)
    _, folder = run()
    rows, result = ledger(folder), summary(folder)
    up, down = (
        [int(row["bytes"]) for row in rows if row["direction"] == direction]
        for direction in ("up", "down")
    )
    assert up == decoded == [n for i, n in enumerate(encoded) if i % 4]  # the model, three updates
    assert down == [n for n in encoded[::4] for _ in range(3)]
    for key, column in (("bytes", "bytes"), ("dense_bytes", "dense_bytes")):
        for direction in ("up", "down"):
            total = sum(int(row[column]) for row in rows if row["direction"] == direction)
            assert result[f"{key}_{direction}"] == total
    assert len(rows) == 4 * 3 * 2  # rounds, clients, one message each way
    assert result["dense_bytes_up"] == 4 * 3 * 4 * result["num_parameters"]
    assert all(int(r["num_values"]) <= 0.05 * 21686 + 1 for r in rows if r["direction"] == "up")


def test_a_client_that_is_not_finite_is_left_out_and_counted(tmp_path, monkeypatch):
    def train(engine, *rest):
        if calls.append(1) or len(calls) == 2:  # the second client diverges
            engine.model.parameters.fill_(float("nan"))
            return float("nan"), 0
        return original(engine, *rest)

    calls, original = [], client.train_client
    monkeypatch.setattr(client, "train_client", train)
    one = make_federation(tmp_path)
    row, _ = one.run_round()
    assert row["num_clients"] == 2 and row["num_failed"] == 1
    assert list(row["failures"].values()) == ["the update is not finite"]
    assert np.isfinite(row["train_loss"])
    assert torch.isfinite(one.server.parameters).all()
    assert len(one.clients.store.versions) == 2


@pytest.mark.parametrize("budget", [1.0, 1e-9], ids=["in memory", "on the disk"])
def test_a_refused_payload_goes_back_into_the_residual(tmp_path, monkeypatch, budget):
    """A payload broken on its way costs a round's progress of a client, not what it learned."""
    one = make_federation(tmp_path, f"clients.state_memory_gib={budget}")
    damage_first(monkeypatch)
    cohort = sample_cohort(one.config, one.candidates, 1)
    trained = one.clients.train(cohort, 1, one.server.broadcast(1, cohort))
    updates = {update.report.client: update.update.clone() for update in trained}
    row, rows = one.run_round()
    assert row["num_failed"] == 1
    assert "checksum" in row["failures"][str(cohort[0])]
    assert torch.equal(one.clients.store.get(cohort[0])["residual"], updates[cohort[0]])
    assert not torch.equal(one.clients.store.get(cohort[1])["residual"], updates[cohort[1]])
    assert len(rows) == 6  # the bytes that did travel are in the ledger


def test_a_round_with_nobody_left_keeps_the_model(tmp_path, monkeypatch):
    def diverge(engine, *_):
        engine.model.parameters.fill_(float("inf"))
        return float("nan"), 0

    monkeypatch.setattr(client, "train_client", diverge)
    one = make_federation(tmp_path)
    before = one.server.sha256()
    row, _ = one.run_round()
    assert row["num_clients"] == 0 and row["train_loss"] is None
    assert one.server.sha256() == before


def test_a_loss_that_is_not_finite_is_logged_as_none(tmp_path, monkeypatch):
    """fp16's loss scaler skips such a step, so the update may be finite."""
    monkeypatch.setattr(client, "train_client", lambda *rest: (float("inf"), 0))
    row, _ = make_federation(tmp_path).run_round()
    assert row["num_failed"] == 0 and row["train_loss"] is None


def test_clients_train_from_what_they_decoded(tmp_path, monkeypatch):
    starts = []
    original = client.train_client

    def train(engine, *rest):
        starts.append(engine.model.read_parameters().clone())
        return original(engine, *rest)

    monkeypatch.setattr(client, "train_client", train)
    one = make_federation(tmp_path, "downlink.values=fp16")
    exact = one.server.parameters.detach().clone()
    one.run_round()
    assert torch.equal(starts[0], exact.half().float())
    assert not torch.equal(starts[0], exact)


def test_batchnorm_buffers_are_averaged_and_counted(tmp_path):
    one = make_federation(tmp_path, "model.name=resnet18", "model.width=0.125", "rounds=1")
    _, rows = one.run_round()
    assert (one.server.buffers[one.server.is_counter] == 2).all()  # two steps a client
    expected = {("down", "model"), ("down", "buffers"), ("up", "update"), ("up", "buffers")}
    assert kinds(rows) == expected
    names = one.model.buffer_layout.names
    bounds = one.model.buffer_layout.offsets
    for name, start, stop in zip(names, bounds[:-1], bounds[1:], strict=True):
        if name.endswith("running_var"):
            assert (one.server.buffers[start:stop] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["FedAdam", "FedYogi"])
def test_500_rounds_of_an_adaptive_server_keep_variances_positive(tmp_path, optimizer):
    """With BatchNorm, top-k and error feedback: what breaks where buffers are stepped by Adam."""
    one = make_plain_federation(
        tmp_path,
        *("model.name=resnet18", "model.width=0.015625", "local.batch_size=4", "local.steps=1"),
        *("clients.per_round=2", "clients.total=2", "evaluation.every=1000", "local.momentum=0.9"),
        *("pruning.method=topk", "pruning.density=0.05", "uplink.values=int8"),
        *("uplink.error_feedback=true", f"server.optimizer={optimizer}"),
    )
    variances = one.model.is_variance
    for _ in range(500):
        assert one.run_round()[0]["num_failed"] == 0
        assert (one.server.buffers[variances] > 0).all()
    assert torch.isfinite(one.server.parameters).all()


# --- clients that take no part --------------------------------------------------------------------


def test_clients_without_examples_are_never_sampled(tmp_path, capsys):
    words = ["clients.total=30", "clients.per_round=10", "data.partition.name=dirichlet"]
    words += ["data.partition.args={alpha: 0.01, min_partition_size: 0}", "local.batch_size=4"]
    one = make_plain_federation(tmp_path, *words)
    empty = {str(number) for number, indices in enumerate(one.shards) if not len(indices)}
    assert empty and "clients without examples" in capsys.readouterr().err
    for _ in range(4):
        row, rows = one.run_round()
        assert row["num_failed"] == 0 and row["num_clients"] == 10 and row["failures"] == {}
        assert not empty & {name for message in rows for name in (message.sender, message.receiver)}
    with pytest.raises(ConfigError, match=f"30 is more than the {30 - len(empty)} clients that"):
        make_plain_federation(tmp_path, *words, "clients.per_round=30", name="all")


def test_a_round_of_clients_without_examples_keeps_the_model(tmp_path):
    one = make_plain_federation(tmp_path, "local.algorithm=SCAFFOLD")
    one.clients.pictures_of = [indices[:0] for indices in one.clients.pictures_of]
    before = one.server.sha256()
    row, _ = one.run_round()
    assert row["num_clients"] == 0 and row["bytes_up"] == 0 and row["train_loss"] is None
    assert one.server.sha256() == before and not one.server.vector.any()


def test_one_client_is_plain_training(tmp_path):
    one = make_plain_federation(tmp_path, "clients.total=1", "clients.per_round=1")
    one.run_round()
    torch.testing.assert_close(one.server.parameters.detach(), one.model.read_parameters())
