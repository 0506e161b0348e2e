"""Local SGD: what one client does in a round, on its own pictures.

Every draw is a function of the client's own seed (draws.py), so the result does not depend on the
rank that trains the client or on the clients that were trained before.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from config import Local
from data import Pictures
from training.draws import Draws
from training.engines import CorrectGradient, Engine
from training.flat_model import FlatModel


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


def local_of(local: Local, client: int) -> Local:
    """How this client trains: for a number of steps of its own, if the config gives it one."""
    steps = local.client_steps
    return replace(local, steps=steps[client % len(steps)], client_steps=[]) if steps else local


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


def batch_places(sizes: list[int], num_examples: int) -> list[tuple[int, int, int]]:
    """Of each batch: its epoch, where in the shuffled order of that epoch it starts, its size."""
    places, epoch, start = [], 0, 0
    for size in sizes:
        if start == num_examples:
            epoch, start = epoch + 1, 0
        places.append((epoch, start, size))
        start += size
    return places


def train_client(
    engine: Engine,
    pictures: Pictures,
    indices: Tensor,  # int64 [num_examples], on the device
    local: Local,
    lr: float,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
    correct_gradient: CorrectGradient | None = None,
) -> tuple[Tensor, int]:
    """Train the engine's model in place on the pictures at `indices`.

    Returns the mean loss of the batches, float32 [] on the device, and the number of steps that
    fp16 skipped because a gradient overflowed. Raises Interrupted between two batches once stop()
    is true.
    """
    model, team = engine.model, engine.team
    draws = Draws.from_seed(seed, model.device)
    sizes = batch_sizes(local, len(indices))
    total_loss = torch.zeros((), device=model.device)
    num_skipped: Tensor | int = 0
    engine.begin(lr, correct_gradient)
    model.train()
    for step, batch in enumerate(_batches(indices, sizes, draws)):
        if stop():
            raise Interrupted
        loss, skipped = engine.train_batch(pictures, batch, draws.at(step))
        total_loss += loss
        num_skipped += skipped
    engine.end()
    team.sum_(total_loss)
    return total_loss / len(sizes), int(num_skipped)


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
    are chosen by this gradient, and SCAFFOLD's option 1 takes it. The weights and BatchNorm's
    statistics stay as they were. Raises Interrupted between two batches once stop() is true.
    """
    draws = Draws.from_seed(seed, model.device)
    buffers, sizes = model.buffers.clone(), batch_sizes(local, len(indices))
    parameters, views = list(model.network.parameters()), model.views(model.gradients)
    model.train()
    model.gradients.zero_()
    for step, batch in enumerate(_batches(indices, sizes, draws)):
        if stop():
            raise Interrupted
        images, labels = pictures.train_batch(batch, draws.at(step))
        model.use_draws(draws.at(step))
        loss = cross_entropy(model.network(images), labels, reduction="sum")
        # Not Tensor.backward(): ZeRO would take the gradients for its own.
        torch._foreach_add_(views, torch.autograd.grad(loss, parameters))
    model.buffers.copy_(buffers)
    return model.gradients / sum(sizes)


def _batches(indices: Tensor, sizes: list[int], draws: Draws) -> Iterator[Tensor]:
    """Yield batches of indices of the given sizes; each epoch is shuffled anew."""
    for epoch, start, size in batch_places(sizes, len(indices)):
        if start == 0:
            shuffled = indices[draws.at(epoch).order(len(indices))]
        yield shuffled[start : start + size]
