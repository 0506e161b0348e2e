"""What pfl_rival.py and flower_rival.py train: our task, with none of our modules.

rivals.py writes it to a file: images uint8 [N, H, W, 3], labels int64 [N], clients int64
[N] (indices, client after client), sizes int64 [num_clients], initial float32 [num_parameters], and
num_classes, cohort, batch_size, lr.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Task:
    network: nn.Module  # with the initial weights, on the device
    clients: list[tuple[Tensor, Tensor]]  # float32 [examples, H, W, 3], int64 [examples], there too
    cohort: int
    batch_size: int
    lr: float


class Channels(nn.Module):
    """[B, H, W, 3] -> [B, 3, H, W]; in memory the channels stay last, or come first."""

    def __init__(self, last: bool):
        super().__init__()
        self.last = last

    def forward(self, images: Tensor) -> Tensor:
        images = images.permute(0, 3, 1, 2)
        return images if self.last else images.contiguous()


def build_network(style: str, height: int, width: int, num_classes: int) -> nn.Module:
    """The network of pfl-research's CIFAR-10 benchmark.

    style: `published`, or `ours`: channels last, and the pool before the second ReLU, which is the
    same function with the same gradient for a quarter of the work.
    """
    relu, pool = nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(
        Channels(last=style == "ours"),
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        *((pool, relu) if style == "ours" else (relu, pool)),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, num_classes),
    )


def normalise(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] to float32 of mean 0 and variance 1 in each channel."""
    mean = images.mean(axis=(0, 1, 2), dtype=np.float64)
    deviation = images.std(axis=(0, 1, 2), dtype=np.float64)
    return (images - mean.astype(np.float32)) / deviation.astype(np.float32)


@cache  # once in a process, so in each of Flower's workers too
def load_task(file: str, style: str) -> Task:
    given = np.load(file)
    images, labels = torch.from_numpy(normalise(given["images"])), torch.from_numpy(given["labels"])
    network = build_network(style, *images.shape[1:3], int(given["num_classes"]))
    nn.utils.vector_to_parameters(torch.from_numpy(given["initial"]), network.parameters())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = images.to(device), labels.to(device)
    shards = np.split(given["clients"], np.cumsum(given["sizes"])[:-1])
    clients = [(images[i], labels[i]) for i in map(torch.from_numpy, shards)]
    cohort, batch_size = int(given["cohort"]), int(given["batch_size"])
    return Task(network.to(device), clients, cohort, batch_size, float(given["lr"]))


def save_weights(network: nn.Module, file: str) -> None:
    """Write the parameters to a file, float32 [num_parameters], from any device."""
    np.save(file, nn.utils.parameters_to_vector(network.parameters()).detach().cpu().numpy())
