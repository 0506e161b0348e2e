"""Local SGD: what one client does in a round, on its own pictures.

Every draw comes from the client's own seed, so the result does not depend on the rank that trains
the client or on the clients that were trained before.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import cycle, islice
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cnn_model import FlatModel
from config import Local
from data import Pictures
from distributed import Team
from training.engines import CorrectGradient


class Engine(Protocol):
    """What train_client() needs of the engines in engines.py and deepspeed_engine.py."""

    model: FlatModel
    team: Team

    def begin(self, lr: float, correct_gradient: CorrectGradient | None) -> None: ...
    def forward(self, images: Tensor) -> Tensor: ...
    def backward(self, loss: Tensor, share: float) -> None: ...
    def step(self) -> Tensor | int: ...
    def end(self) -> None: ...


class Interrupted(Exception):
    """The user asked the run to stop (Ctrl-C or SIGTERM)."""


def local_lr(local: Local, round_number: int, rounds: int) -> float:
    """The clients' learning rate in a round, counted from 1."""
    schedule, done = local.lr_schedule, round_number - 1
    factors: dict[str, Callable[[], float]] = {
        "constant": lambda: 1.0,
        "cosine": lambda: 0.5 * (1 + math.cos(math.pi * done / rounds)),
        "exponential": lambda: schedule.gamma**done,
        "step": lambda: schedule.gamma ** sum(done >= m for m in schedule.milestones),
    }
    return local.lr * factors[schedule.name]()


def batch_sizes(local: Local, num_examples: int) -> list[int]:
    """The sizes of the batches that a client with num_examples trains in a round, in order.

    An epoch is split into batches of local.batch_size; the last one holds what is left. If one
    example is left, it joins the batch before, because BatchNorm cannot normalise a single value.
    local.steps counts batches and runs on into further epochs. A client without examples has none.
    """
    full, left = divmod(num_examples, local.batch_size)
    epoch = [local.batch_size] * full
    if left == 1 and epoch:
        epoch[-1] += 1
    elif left:
        epoch.append(left)
    return list(islice(cycle(epoch), local.steps or local.epochs * len(epoch)))


def train_client(
    engine: Engine,
    pictures: Pictures,
    indices: Tensor,  # int64 [num_examples], on the device
    local: Local,
    lr: float,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
    correct_gradient: CorrectGradient | None = None,
) -> tuple[float, int]:
    """Train the engine's model in place on the pictures at `indices`.

    Returns the mean loss of the batches and the number of steps that were skipped, as fp16 does if
    a gradient overflows. Raises Interrupted between two batches once stop() is true.
    """
    model, team = engine.model, engine.team
    generator = torch.Generator(model.device).manual_seed(seed)
    sizes = batch_sizes(local, len(indices))
    total_loss = torch.zeros((), device=model.device)
    num_skipped = torch.zeros((), dtype=torch.int64, device=model.device)
    engine.begin(lr, correct_gradient)
    model.train()
    with _fork_rng(model.device):
        # Dropout draws from the global generator. The ranks of a team see different pictures of a
        # batch, so each one draws masks of its own.
        torch.manual_seed(seed + team.rank)
        for batch in _batches(indices, sizes, generator):
            if stop():
                raise Interrupted
            images, labels = pictures.train_batch(batch, generator)
            # A rank beyond the end of a small batch looks at a picture that does not count.
            mine = slice(team.rank, None, team.size) if team.rank < len(batch) else slice(1)
            images, labels = images[mine], labels[mine]
            share = len(labels) / len(batch) if team.rank < len(batch) else 0.0
            loss = cross_entropy(engine.forward(images), labels)
            engine.backward(loss, share)
            num_skipped += engine.step()
            total_loss += loss.detach() * share
    engine.end()
    team.sum_(total_loss)
    return float(total_loss) / len(sizes), int(num_skipped)


def loss_gradient(
    model: FlatModel,
    pictures: Pictures,
    indices: Tensor,  # int64 [num_examples], on the device
    local: Local,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
) -> Tensor:
    """The gradient of the mean loss at the model's weights, in fp32, as an aligned vector.

    The mean is over the examples of the batches that batch_sizes(local, num_examples) lists. Masks
    are chosen by this gradient, and SCAFFOLD's option 1 takes it. The weights, BatchNorm's
    statistics and the random state of training stay as they were. Raises Interrupted between two
    batches once stop() is true.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    buffers, sizes = model.buffers.clone(), batch_sizes(local, len(indices))
    parameters, views = list(model.network.parameters()), model.views(model.gradients)
    model.train()
    model.gradients.zero_()
    with _fork_rng(model.device):
        torch.manual_seed(seed)
        for batch in _batches(indices, sizes, generator):
            if stop():
                raise Interrupted
            images, labels = pictures.train_batch(batch, generator)
            loss = cross_entropy(model.network(images), labels, reduction="sum")
            # Not Tensor.backward(): ZeRO would take the gradients for its own.
            torch._foreach_add_(views, torch.autograd.grad(loss, parameters))
    model.buffers.copy_(buffers)
    return model.gradients / sum(sizes)


def _fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Within this context, draws leave torch's global generators as they were."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _batches(indices: Tensor, sizes: list[int], generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of indices of the given sizes; each epoch is shuffled anew."""
    start = len(indices)
    for size in sizes:
        if start == len(indices):
            order = torch.randperm(len(indices), generator=generator, device=indices.device)
            shuffled, start = indices[order], 0
        yield shuffled[start : start + size]
        start += size
