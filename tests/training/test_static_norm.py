"""static_norm.py against BatchNorm2d(momentum=None), which averages over all batches itself."""

import copy

import pytest
import torch
from helpers.networks import build
from helpers.pictures import noise
from torch import nn

from data import Pictures
from training.draws import Draws
from training.evaluation import evaluate
from training.flat_model import FlatModel
from training.static_norm import NUM_BATCHES, static_statistics


def some_pictures() -> Pictures:
    return Pictures(noise(300, 50, 8, 8), torch.device("cpu"), padding=1)


def pair() -> tuple[FlatModel, nn.Module]:
    """A network without statistics, and its twin that tracks their cumulative mean."""
    network = build("resnet18", width=0.0625, tracks_statistics=False)
    twin = build("resnet18", width=0.0625)
    twin.load_state_dict(copy.deepcopy(network.state_dict()), strict=False)
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    return FlatModel(network, torch.device("cpu")), twin


def test_the_statistics_are_means_over_batches_of_training_pictures():
    pictures, (model, twin) = some_pictures(), pair()
    draws = Draws.from_seed(7, model.device)
    order = draws.order(pictures.num_train)
    twin.train()
    with torch.no_grad():
        for step in range(NUM_BATCHES):
            batch = order[20 * step : 20 * step + 20]
            twin(pictures.train_batch(batch, draws.at(step))[0])
    twin.eval()
    images, _ = pictures.evaluation_batch("test", 0, 50)
    with static_statistics(model, pictures, "fp32", 20, 7):
        evaluate(model, pictures, "fp32", "test", 0, 50)
        assert torch.equal(model.network(images), twin(images))


def test_nothing_is_left_of_them_and_nothing_travels():
    pictures, (model, _) = some_pictures(), pair()
    before = model.read_parameters().clone()
    with pytest.raises(KeyError):
        with static_statistics(model, pictures, "fp32", 20, 7):
            raise KeyError
    assert model.buffer_layout.size == 0 and not list(model.network.buffers())
    assert torch.equal(model.read_parameters(), before)
    model.train()
    images, _ = pictures.evaluation_batch("test", 0, 4)
    one = model.network(images)
    assert torch.equal(one, model.network(images))  # training leaves no trace either


def test_a_model_is_scored_with_its_own_statistics(run):
    from helpers.runs import rounds, summary

    words = ["model.name=resnet18", "model.width=0.125", "model.norm_policy=static"]
    words += ["local.steps=20", "rounds=4", "evaluation.batch_size=100", "server.optimizer=FedAvg"]
    words += ["pruning.method=none", "uplink.values=fp32"]
    status, folder = run(*words)
    assert status == 0 and summary(folder)["test_accuracy"] > 0.5
    assert "buffers" not in (folder / "ledger.csv").read_text()
    assert len(rounds(folder)) == 4
