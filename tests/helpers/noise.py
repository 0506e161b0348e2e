"""Three classes of 8x8 noise, and networks that are small enough to train on it in no time."""

import torch
from torch import nn

from cnn_model import build_network
from data import Pictures
from data.datasets import Dataset
from training.flat_model import FlatModel

CPU = torch.device("cpu")


def make_pictures(padding: int = 0, flip: bool = False, device: torch.device = CPU) -> Pictures:
    """43 pictures to train on and 17 to test on; no augmentation unless asked for."""
    generator = torch.Generator().manual_seed(0)

    def noise(count):
        images = torch.randint(256, (count, 8, 8, 3), generator=generator, dtype=torch.uint8)
        return images, torch.randint(3, (count,), generator=generator)

    fields = (*noise(43), *noise(17), ("a", "b", "c"), "0" * 64)
    return Pictures(Dataset("noise", *fields), device, padding, flip)


PICTURES = make_pictures()


def network(name: str = "lenet", seed: int = 0) -> nn.Module:
    return build_network(name, 3, (8, 8), seed, width=0.125)


def flat_model(name: str = "lenet") -> FlatModel:
    """The same network, always from the same start, in flat vectors."""
    return FlatModel(network(name), CPU)
