"""What a client does in a round: local SGD on its own pictures.

Every draw comes from the client's own seed, so the result does not depend on the rank that trains
the client or on who was trained before.
"""

import math
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cnn_model import FlatModel
from config import Local
from data import Pictures
from distributed import Team
from training.engines import Amend, TorchEngine, autocast

PROBE_SECONDS = 2.0
CLEARLY_FASTER = 0.85  # bf16 must take less than this share of fp32's time: probes are noisy


class Engine(Protocol):
    """What train() needs of engines.py's or deepspeed_engine.py's."""

    model: FlatModel
    team: Team

    def begin(self, lr: float, amend: Amend | None) -> None: ...
    def forward(self, images: Tensor) -> Tensor: ...
    def backward(self, loss: Tensor, share: float) -> None: ...
    def step(self) -> Tensor | int: ...
    def end(self) -> None: ...


class Interrupted(Exception):
    """The user asked the run to stop (Ctrl-C or SIGTERM)."""


def local_lr(local: Local, round: int, rounds: int) -> float:
    """The clients' learning rate in `round`, counted from 1."""
    schedule, done = local.lr_schedule, round - 1
    factors: dict[str, Callable[[], float]] = {
        "constant": lambda: 1.0,
        "cosine": lambda: 0.5 * (1 + math.cos(math.pi * done / rounds)),
        "exponential": lambda: schedule.gamma**done,
        "step": lambda: schedule.gamma ** sum(done >= m for m in schedule.milestones),
    }
    return local.lr * factors[schedule.name]()


def num_steps(local: Local, num_examples: int) -> int:
    """How many batches a client of num_examples trains in a round."""
    return local.steps or local.epochs * len(batch_bounds(num_examples, local.batch_size)[1:])


def batch_bounds(num_examples: int, batch_size: int) -> list[int]:
    """Where an epoch's batches begin and end: [0, B, 2B, ..., num_examples].

    A last batch of one example joins the batch before it: BatchNorm cannot normalise one value.
    """
    bounds = [*range(0, num_examples, batch_size), num_examples]
    if batch_size > 1 and len(bounds) > 2 and bounds[-1] - bounds[-2] == 1:
        del bounds[-2]
    return bounds


def train(
    engine: Engine,
    pictures: Pictures,
    indices: Tensor,  # int64 [num_examples], on the device
    local: Local,
    lr: float,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
    amend: Amend | None = None,  # see engines.py
) -> tuple[float, int]:
    """Train the engine's model in place on the pictures at `indices`.

    Returns the mean loss of the batches and the number of steps that were skipped, as fp16 does
    where a gradient overflows. Raises Interrupted between two batches once stop() says so.
    """
    model, team = engine.model, engine.team
    generator = torch.Generator(model.device).manual_seed(seed)
    steps = num_steps(local, len(indices))
    total_loss = torch.zeros((), device=model.device)
    num_skipped = torch.zeros((), dtype=torch.int64, device=model.device)
    engine.begin(lr, amend)
    model.train()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # dropout draws from the global generator
        torch.manual_seed(seed)
        for batch in _batches(indices, local.batch_size, steps, generator):
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
    return float(total_loss) / steps, int(num_skipped)


def loss_gradient(
    model: FlatModel,
    pictures: Pictures,
    indices: Tensor,  # int64 [num_examples], on the device
    batch_size: int,
    num_batches: int | None,  # None: all examples once
    seed: int,
    stop: Callable[[], bool] = lambda: False,
) -> Tensor:
    """The gradient of the mean loss at the model's weights, float32 [num_parameters], in fp32.

    Masks are chosen by it, and SCAFFOLD's option 1 takes it. It leaves the weights, the statistics
    of BatchNorm and the random state of training as they were. Raises Interrupted.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    buffers = model.buffers.clone()
    devices = [model.device] if model.device.type == "cuda" else []
    num_batches = num_batches or len(batch_bounds(len(indices), batch_size)) - 1
    num_examples = 0
    parameters, views = list(model.network.parameters()), model.views(model.gradients)
    model.train()
    model.gradients.zero_()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for batch in _batches(indices, batch_size, num_batches, generator):
            if stop():
                raise Interrupted
            images, labels = pictures.train_batch(batch, generator)
            loss = cross_entropy(model.network(images), labels, reduction="sum")
            # Not backward(): ZeRO would take the gradients for its own.
            torch._foreach_add_(views, torch.autograd.grad(loss, parameters))
            num_examples += len(batch)
    model.buffers.copy_(buffers)
    return model.gradients / num_examples


def _batches(indices: Tensor, batch_size: int, steps: int, generator: torch.Generator):
    """Yield `steps` batches of shuffled indices, epoch after epoch."""
    bounds, done = batch_bounds(len(indices), batch_size), 0
    while True:
        shuffled = indices[torch.randperm(len(indices), generator=generator, device=indices.device)]
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            if done == steps:
                return
            yield shuffled[start:stop]
            done += 1


@torch.no_grad()
def evaluate(
    model: FlatModel, pictures: Pictures, precision: str, split: str, start: int, stop: int
) -> tuple[list[int], float]:
    """(number right of each class, summed loss) over the pictures start:stop of a split."""
    model.network.eval()
    images, labels = pictures.evaluation_batch(split, start, stop)
    with autocast(model.device, precision):
        logits = model.network(images)
    loss = cross_entropy(logits.float(), labels, reduction="sum")
    right = labels[logits.argmax(1) == labels]
    return torch.bincount(right, minlength=pictures.num_classes).tolist(), float(loss)


def probe_precision(model: FlatModel, pictures: Pictures, local: Local) -> dict[str, float]:
    """Seconds of one training step in fp32 and bf16, measured in turn for about two seconds.

    It trains the model: take a copy of its vectors before.
    """
    indices = torch.arange(min(local.batch_size, pictures.num_train), device=model.device)
    one_step = Local(steps=1, batch_size=local.batch_size)
    engines = {name: TorchEngine(model, one_step, name, Team()) for name in ("fp32", "bf16")}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    begin = time.perf_counter()
    while time.perf_counter() - begin < PROBE_SECONDS or len(seconds["bf16"]) < 2:
        for precision, times in seconds.items():
            start = time.perf_counter()
            train(engines[precision], pictures, indices, one_step, 1e-9, seed=0)
            times.append(time.perf_counter() - start)
    return {precision: min(times) for precision, times in seconds.items()}


def choose_precision(seconds: dict[str, float]) -> str:
    return "bf16" if seconds["bf16"] < CLEARLY_FASTER * seconds["fp32"] else "fp32"
