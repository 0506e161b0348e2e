"""slices.py: where a narrower network's weights lie, against slices of the tensors themselves."""

import numpy as np
import pytest
import torch
from helpers.ends import NO_BUFFERS
from helpers.networks import flat

from config import Config
from federation.agreement import Agreement
from federation.slices import Slice, slice_positions

NETWORKS = {
    "resnet18": dict(width=0.125),
    "resnet50": dict(width=0.0625),
    "resnet18v2": dict(width=0.125, norm="group(2)"),
    "cnn": dict(width=0.25, size=(32, 32)),
    "lenet": dict(width=2.0, size=(32, 32)),
}


@pytest.mark.parametrize("share", [1.0, 0.5, 0.3, 0.25])
@pytest.mark.parametrize("name", NETWORKS)
def test_positions_are_those_of_prefixes(name, share):
    settings = NETWORKS[name]
    if "norm" in settings and share == 0.3:
        pytest.skip("two groups do not divide so few channels")
    whole = flat(name, **settings)
    narrow = flat(name, **(settings | {"width": settings["width"] * share}))
    for layout, smaller, named in (
        (whole.layout, narrow.layout, whole.network.named_parameters()),
        (whole.buffer_layout, narrow.buffer_layout, whole.network.named_buffers()),
    ):
        vector = torch.arange(layout.size)
        tensors = vector.split(layout.sizes.tolist())
        expected = []
        for (tensor_name, tensor), flat_places, prefix in zip(
            named, tensors, smaller.shapes, strict=True
        ):
            places = flat_places.view(tensor.shape)
            for dimension, length in enumerate(prefix):
                places = places.narrow(dimension, 0, length)
            assert places.shape == prefix, tensor_name
            expected.append(places.reshape(-1))
        positions = slice_positions(layout, smaller)
        assert positions.dtype == np.int64 and (np.diff(positions) > 0).all()
        assert positions.tolist() == torch.cat([torch.arange(0), *expected]).tolist()


def test_a_narrow_network_computes_with_the_prefixes():
    """The flattened channels of LeNet included: its logits are those of a network cut by hand."""
    whole, narrow = flat("lenet", size=(32, 32), width=2.0), flat("lenet", size=(32, 32), width=1.0)
    positions = torch.from_numpy(slice_positions(whole.layout, narrow.layout))
    narrow.load(whole.read_parameters()[positions])
    pictures = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    layers = whole.network
    x = torch.relu(torch.max_pool2d(layers[0](pictures)[:, :6], 2))
    x = torch.conv2d(x, layers[3].weight[:16, :6], layers[3].bias[:16])
    x = torch.relu(torch.max_pool2d(x, 2)).flatten(1)
    for layer, (rows, columns) in ((layers[7], (120, 400)), (layers[9], (84, 120))):
        x = torch.relu(x @ layer.weight[:rows, :columns].T + layer.bias[:rows])
    expected = x @ layers[11].weight[:, :84].T + layers[11].bias
    torch.testing.assert_close(narrow.network(pictures), expected)


def test_a_slice_cuts_adds_and_knows_what_is_outside():
    whole, narrow = flat("lenet", width=1.0), flat("lenet", width=0.5)
    positions = torch.from_numpy(slice_positions(whole.layout, narrow.layout))
    piece = Slice(Agreement(Config(), narrow.layout, NO_BUFFERS), positions)
    vector = torch.randn(whole.layout.size, generator=torch.Generator().manual_seed(0))
    part = piece.cut(vector)
    assert torch.equal(part, vector[positions])
    expected = vector.clone()
    expected[positions] += 0.5 * part
    piece.add_to(vector, part, 0.5)
    assert torch.equal(vector, expected)
    outside = piece.outside(len(vector))
    assert outside.nonzero().flatten().tolist() == sorted(
        set(range(len(vector))) - set(positions.tolist())
    )
    everything = Slice(Agreement(Config(), whole.layout, NO_BUFFERS), None)
    assert everything.cut(vector) is vector and everything.outside(len(vector)) is None
