"""scaler.py: a narrow network's outputs are scaled in training, and only then."""

import pytest
import torch
from helpers.networks import build
from torch import nn

from training.scaler import scale_outputs


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 10)
    )


@pytest.mark.parametrize("width", [0.5, 0.25])
def test_what_is_divided_by_the_width(width):
    plain, scaled, pictures = layers(), layers(), torch.randn(2, 3, 4, 4)
    scale_outputs(scaled, width)
    x = plain[1](plain[0](pictures) / width)
    expected = plain[4](plain[3](plain[2](x) / width))
    assert torch.equal(scaled.train()(pictures), expected)
    assert torch.equal(scaled.eval()(pictures), plain(pictures))


def test_every_convolution_of_a_resnet_and_not_its_head():
    network = build("resnet18", width=0.0625)
    scale_outputs(network, 0.5)
    hooked = {name for name, module in network.named_modules() if module._forward_hooks}
    convolutions = {name for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    assert hooked == convolutions and len(convolutions) == 20


def test_a_whole_network_stays_as_it_is():
    network = layers()
    scale_outputs(network, 1.0)
    assert not any(module._forward_hooks for module in network.modules())
