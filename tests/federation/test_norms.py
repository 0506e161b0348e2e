"""Norm layers under averaging: averaged, each client's own (FedBN), or frozen; never negative."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.runs import kinds, make_plain_federation
from torch import nn

from algorithms import ALGORITHMS
from cnn_model import FlatModel, build_network
from compression import encode
from config import ConfigError
from federation import client
from federation.cohort import sample_cohort
from training import local_sgd

RESNET = ["model.name=resnet18", "model.width=0.0625", "local.batch_size=8"]


def test_norm_positions_are_the_weights_and_biases_of_norm_layers():
    for norm in ("batch", "group(2)"):
        model = FlatModel(build_network("resnet18", 10, (8, 8), 0, norm=norm, width=0.0625), "cpu")
        marks = torch.zeros(model.layout.size)
        for module in model.network.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                module.weight.data.fill_(7.0)
                module.bias.data.fill_(7.0)
        marks[model.norm_positions()] = 1
        assert torch.equal(marks.bool(), model.parameters == 7.0)
    assert len(FlatModel(build_network("lenet", 10, (8, 8), 0), "cpu").norm_positions()) == 0


def test_frozen_statistics_never_change_nor_travel(tmp_path):
    one = make_plain_federation(tmp_path, *RESNET, "model.norm_policy=frozen")
    before = one.server.buffers.clone()
    weights = one.server.parameters.detach().clone()
    _, rows = one.run_round()
    assert torch.equal(one.server.buffers, before) and torch.equal(one.model.read_buffers(), before)
    assert not torch.equal(one.server.parameters, weights)
    assert kinds(rows) == {("down", "model"), ("up", "update")}


def test_frozen_statistics_are_those_of_training(tmp_path):
    """The loss of a training batch is that of the network in evaluation."""
    one = make_plain_federation(tmp_path, *RESNET, "model.norm_policy=frozen")
    one.model.train()
    images, _ = one.pictures.evaluation_batch("test", 0, 8)
    trained = one.model.network(images)
    assert torch.equal(trained, one.model.network.eval()(images))


def test_local_norm_layers_stay_with_their_client(tmp_path):
    one = make_plain_federation(tmp_path, *RESNET, "model.norm_policy=local", "clients.per_round=4")
    own = one.clients.own_positions
    norms = one.server.parameters.detach()[own].clone()
    received = []
    load = one.clients.load
    one.clients.load = lambda p, b, s=None: (
        load(p, b, s)
        or received.append(torch.cat([one.model.read_parameters()[own], one.model.read_buffers()]))
    )
    rows = [row for _ in range(2) for row in one.run_round()[1]]
    assert torch.equal(one.server.parameters.detach()[own], norms)  # the server's never move
    assert kinds(rows) == {("down", "model"), ("up", "update")}
    held = [one.clients.store.get(client)["norm"] for client in range(4)]
    assert len({tensor.numpy().tobytes() for tensor in held}) == 4  # each its own
    evaluated = received[-4:]  # the last evaluation loads the four models
    assert all(torch.equal(a, b) for a, b in zip(evaluated, held, strict=True))
    assert all((tensor[len(own) :][one.model.is_variance] > 0).all() for tensor in held)


def test_the_accuracy_with_local_norm_layers_is_the_mean_of_the_cohorts_models(tmp_path):
    one = make_plain_federation(tmp_path, *RESNET, "model.norm_policy=local")
    row, _ = one.run_round()
    cohort = sample_cohort(one.config, one.candidates, 1)
    accuracies = []
    for state in map(one.clients.store.get, cohort):
        one.clients.load(one.server.parameters.detach(), one.server.buffers, state)
        images, labels = one.pictures.evaluation_batch("test", 0, 360)
        with torch.no_grad():
            right = one.model.network.eval()(images).argmax(1) == labels
        accuracies.append(float(right.float().mean()))
    assert row["test_accuracy"] == pytest.approx(np.mean(accuracies))


def hold_still(monkeypatch, positions):
    """From now on the weights at these positions, bool [num_parameters], have no gradient."""

    def train(*args):
        *rest, correct = args

        def correct_gradient(weights, gradient):
            if correct:
                correct(weights, gradient)
            gradient.masked_fill_(positions, 0.0)

        return original(*rest, correct_gradient)

    original = local_sgd.train
    monkeypatch.setattr(client, "train_client", train)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_algorithm_reaches_into_local_norm_layers(tmp_path, monkeypatch, name):
    """Nothing of them is sent, and with all else held still they train as FedAvg's do."""
    words = [*RESNET, "model.norm_policy=local", "clients.per_round=4", "local.lr=0.01"]
    norms = []
    for algorithm in ("FedAvg", name):
        one = make_plain_federation(
            tmp_path, *words, f"local.algorithm={algorithm}", name=f"run{len(norms)}"
        )
        own = one.clients.own_positions
        others = torch.ones(one.model.layout.size, dtype=torch.bool)
        others[own] = False
        hold_still(monkeypatch, others)
        for _ in range(3):
            one.run_round()
        assert one.server.vector is None or not one.server.vector[own].any()
        norms.append([one.clients.store.get(client)["norm"] for client in range(4)])
    for ours, plain in zip(*norms, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("how", ["no examples", "not finite"])
def test_local_norm_layers_of_a_client_that_has_kept_nothing(tmp_path, monkeypatch, how):
    one = make_plain_federation(tmp_path, *RESNET, "model.norm_policy=local", "clients.per_round=4")
    if how == "no examples":
        one.clients.pictures_of[2] = one.clients.pictures_of[2][:0]
    else:
        monkeypatch.setattr(
            "federation.client.train_client",
            lambda e, *_: (e.model.parameters.fill_(np.nan), (0.0, 0))[1],
        )
    row, _ = one.run_round()
    assert row["num_failed"] == (1 if how == "no examples" else 4)
    assert 0 <= row["test_accuracy"] <= 1


def test_a_finished_run_keeps_its_clients_norm_layers(run):
    _, folder = run(*RESNET, "model.norm_policy=local")
    states = list((folder / "clients").glob("*.pt"))
    assert len(states) == 4
    assert all("norm" in torch.load(path, weights_only=True) for path in states)


def test_a_negative_variance_is_refused(tmp_path):
    one = make_plain_federation(tmp_path, *RESNET)
    cohort = sample_cohort(one.config, one.candidates, 1)
    broadcast = one.server.broadcast(1, cohort)
    reports = [one._train_and_encode(client, 1, broadcast) for client in cohort]
    buffers = one.server.buffers.clone()
    buffers[one.model.is_variance.nonzero()[3]] = -1e-3
    payload, _ = encode(buffers, one.model.buffer_layout)
    reports[0].messages = [
        replace(message, payload=payload) if message.kind == "buffers" else message
        for message in reports[0].messages
    ]
    average = one.server.new_average(cohort)
    for report in reports:
        average.add(report, 1)
    assert one.server.step(average, 1) == cohort[1:]
    assert reports[0].failure == "payload refused: buffers: a running variance is negative"
    assert (one.server.buffers[one.model.is_variance] > 0).all()


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
