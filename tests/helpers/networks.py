"""Small networks, and their view as vectors."""

import torch
from torch import nn

from cnn_model import build_network
from training.flat_model import FlatModel

SMALL = dict(width=0.125)  # a ResNet-18 of 176 thousand parameters


def build(name: str, size=(8, 8), seed: int = 0, **settings) -> nn.Module:
    return build_network(name, settings.pop("num_classes", 10), size, seed, **settings)


def flat(name: str, device: str = "cpu", **settings) -> FlatModel:
    return FlatModel(build(name, **settings), torch.device(device))
