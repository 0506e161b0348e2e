"""Whole runs of HeteroFL and FjORD: at width 1 they equal FedAvg, and a kill changes nothing.

tests/test_ranks.py runs them on two ranks.
"""

import pytest
import torch
from helpers.runs import REPOSITORY, TINY, killed_before_logging, make_federation, summary

from command_line import load_config
from experiment import main

SLICES = ["submodel.widths=[1,0.5,0.25]", "clients.total=6", "clients.per_round=5"]
STATIC = ["model.name=resnet18", "model.width=0.0625", "model.norm_policy=static"]
DROPOUT = [*SLICES, "submodel.ordered_dropout=true"]
FEDBUFF = ["schedule.name=fedbuff", "schedule.buffer=2", "schedule.concurrency=3"]


@pytest.mark.parametrize(
    "words",
    [
        ["submodel.ordered_dropout=true"],
        [*STATIC, "uplink.values=eden2", "uplink.error_feedback=false", "pruning.method=random"],
        [*FEDBUFF, "network.availability.dropout=0.2"],
        ["downlink.mode=change", "downlink.values=int8", "local.algorithm=FedNova"],
    ],
    ids=["ordered dropout", "static", "fedbuff", "changes"],
)
def test_width_1_everywhere_is_fedavg(run, words):
    words = ["server.optimizer=FedAvg", *words]
    plain = [word for word in words if "submodel" not in word]
    status, one = run(*plain, name="plain")
    other_status, other = run(*words, "submodel.widths=[1]", name="submodel")
    assert status == other_status == 0
    assert summary(one)["model_sha256"] == summary(other)["model_sha256"]
    assert (one / "ledger.csv").read_text() == (other / "ledger.csv").read_text()


@pytest.mark.parametrize(
    "words",
    [
        [*DROPOUT, "local.algorithm=FedProx", "schedule.over_selection=1.2"],
        [*SLICES, *FEDBUFF, "network.availability.dropout=0.2"],
        [*SLICES, *STATIC, "downlink.mode=change", "downlink.values=int8"],
    ],
    ids=["ordered dropout", "fedbuff", "static"],
)
def test_a_run_that_was_killed_ends_as_one_that_was_not(run, monkeypatch, words):
    status, whole = run(*words, name="whole")
    killed = killed_before_logging(run, monkeypatch, 3, *words)
    assert status == 0
    assert summary(killed)["model_sha256"] == summary(whole)["model_sha256"]
    assert (killed / "ledger.csv").read_text() == (whole / "ledger.csv").read_text()


def test_what_a_narrow_client_owes_is_in_its_own_coordinates(tmp_path):
    one = make_federation(tmp_path, *SLICES, "clients.per_round=6")
    one.run_round()
    for client in range(6):
        residual = one.clients.store.get(client)["residual"]
        assert len(residual) == one.models[one.widths.share_of(client)].layout.size


def test_lanes_train_each_width_together(tmp_path):
    """As on a GPU: the model is that of clients trained one by one, but for rounding."""
    words = [*SLICES, *STATIC, "pruning.method=none", "uplink.values=fp32", "local.lr=0.01"]
    words += ["server.optimizer=FedAvg"]
    one = make_federation(tmp_path, *words, "local.lanes=1", name="one")
    many = make_federation(tmp_path, *words, "local.lanes=2", name="many")
    for federation in (one, many):
        federation.run_round()
    torch.testing.assert_close(one.server.parameters, many.server.parameters, rtol=0, atol=1e-4)


def test_the_wish_to_stop_reaches_every_width(tmp_path):
    one = make_federation(tmp_path, *DROPOUT)
    one.clients.stop_requested = True
    assert all(clients.stop_requested for clients in one.clients.by_share.values())


def test_a_dry_run_says_who_trains_what(tmp_path, capsys):
    words = [*TINY, *SLICES, f"output_dir={tmp_path}", "local.steps=null", "precision=auto"]
    assert main(load_config(REPOSITORY / "configs/default.yaml", words), dry_run=True) == 0
    said = capsys.readouterr().out
    assert "shares of the channels, by clients that train them: 1 by 2, 0.5 by 2, 0.25 by 2" in said
    assert not list(tmp_path.iterdir())
