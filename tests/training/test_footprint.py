"""footprint.py against counts by hand."""

import pytest
import torch
from helpers.networks import flat
from torch import nn

from training.flat_model import FlatModel
from training.footprint import footprint

META = torch.device("meta")


def tiny(hidden: int = 5) -> FlatModel:
    """3 x 4 x 4 pictures, two channels, `hidden` neurons, ten classes."""
    layers = [nn.Conv2d(3, 2, 3), nn.Flatten(), nn.ReLU(), nn.Linear(8, hidden), nn.ReLU()]
    return FlatModel(nn.Sequential(*layers, nn.Linear(hidden, 10)), META)


@pytest.mark.parametrize("num_state_vectors", [0, 1, 2])
def test_a_network_counted_by_hand(num_state_vectors):
    batch = 7
    # Every tensor begins at a multiple of four floats: 54, 2, 40, 5, 50 and at last 10 of them.
    parameters = 56 + 4 + 40 + 8 + 52 + 10
    floats = (2 + num_state_vectors) * parameters
    floats += batch * 3 * 4 * 4  # the pictures, which the convolution saves
    floats += batch * 8  # what ReLU put out, which the linear layer saves too
    floats += batch * 5  # likewise
    floats += batch * 10 + 1  # log_softmax, and the loss's weight
    found = footprint(tiny(), batch, (4, 4), num_state_vectors)
    assert found.num_bytes == 4 * floats + 8 * batch  # the labels are int64
    assert found.flops == 2 * batch * (4 * 2 * 27 + 8 * 5 + 5 * 10)


def test_more_examples_and_more_channels_take_more():
    small = footprint(tiny(), 1, (4, 4), 0)
    large = footprint(tiny(), 2, (4, 4), 0)
    wide = footprint(tiny(9), 1, (4, 4), 0)
    assert large.flops == 2 * small.flops
    assert small.num_bytes < large.num_bytes and small.num_bytes < wide.num_bytes


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet18v2", "cnn", "lenet"])
def test_every_network_can_be_counted_and_half_the_width_takes_less(name):
    width = {"cnn": 0.5, "lenet": 1.0}.get(name, 0.125)
    sizes = [(32, 32)] * 2
    whole, half = (
        footprint(flat(name, size=size, width=share * width, device="meta"), 8, size, 1)
        for share, size in zip((1.0, 0.5), sizes, strict=True)
    )
    assert half.num_bytes < 0.6 * whole.num_bytes
    assert half.flops < 0.6 * whole.flops


def test_a_real_pass_holds_as_much():
    """Of a ReLU network without BatchNorm, whose kernels may save other things on a CPU."""
    model = flat("lenet", size=(32, 32), width=1.0)
    saved = {}  # by address; the tensors stay alive, so that no address is used twice

    def hold(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images, labels = torch.zeros(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        loss = nn.functional.cross_entropy(model.network(images), labels)
    for tensor in (model.parameters, model.gradients, model.buffers, images, labels):
        saved[tensor.untyped_storage().data_ptr()] = tensor
    expected = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del loss
    meta = flat("lenet", size=(32, 32), width=1.0, device="meta")
    assert footprint(meta, 8, (32, 32), 0).num_bytes == pytest.approx(expected, rel=0.01)
