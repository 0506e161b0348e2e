"""Many clients at once: L clients train in L lanes of one device, a step of all of them together.

A small network leaves most of a GPU idle. torch.func.vmap runs it with stacked weights, a client in
each row, so that one kernel does the work of L. A lane's result does not depend on its companions:
lanes that have no work repeat the first client's and change nothing. So it does not matter either
which clients a rank trains together.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from config import ConfigError, Local
from data import Pictures
from training.correction import Correction, Held
from training.draws import Draws
from training.engines import autocast
from training.flat_model import FlatModel
from training.flat_sgd import flat_sgd
from training.graphs import Graphs, Record, recorder
from training.local_sgd import Interrupted, batch_places, batch_sizes


@dataclass(frozen=True)
class Job:
    """A client to train. The vectors are laid out as FlatModel's `parameters` and `buffers` are."""

    indices: Tensor  # int64 [num_examples], at least one, on the device
    lr: float
    seed: int
    parameters: Tensor
    buffers: Tensor
    correction: Correction | None = None
    steps: int | None = None  # how many batches; None: as the config says

    def batch_sizes(self, local: Local) -> list[int]:
        """The sizes of its batches, in order."""
        return batch_sizes(replace(local, steps=self.steps or local.steps), len(self.indices))


@dataclass(frozen=True)
class Trained:
    """What became of a Job: views into the lanes, which are valid until the next train()."""

    parameters: Tensor
    buffers: Tensor
    loss: Tensor  # float32 []: the mean over the batches
    num_skipped: int = 0  # as train_client() returns it: only fp16 skips steps


def group_by_steps(num_steps: list[int], num_lanes: int) -> list[list[int]]:
    """Deal clients, given by how many steps each trains, into groups of at most num_lanes.

    Whole groups of clients with equally many steps come first, the longest before the others. The
    clients that are left are grouped by length. Returns positions in num_steps.
    """
    whole, left = [], []
    for length in sorted(set(num_steps), reverse=True):
        members = [client for client, steps in enumerate(num_steps) if steps == length]
        full = len(members) - len(members) % num_lanes
        whole += members[:full]
        left += members[full:]
    order = whole + left
    return [order[start : start + num_lanes] for start in range(0, len(order), num_lanes)]


class Plan:
    """Which pictures each lane sees in each step.

    A step of a client is taken in its lane if its batch is a full one. Without batch statistics a
    smaller batch is, too: it is filled up with pictures that do not count. Other steps are `alone`.

    Attributes: num_steps; batches: int64 [T, L, B]; shares: float32 [T, L, B], what each picture
    counts in its batch's mean loss, 0 where a lane takes no step; num_together: for each step, how
    many lanes take it; alone: for each step, the lanes that take it by themselves, with their
    pictures, int64 [size].
    """

    def __init__(self, jobs: list[Job], draws: Draws, local: Local, fills_up: bool, num_jobs: int):
        """fills_up: whether smaller batches are; num_jobs: those after so many take no step."""
        device, wanted = draws.key.device, local.batch_size
        lengths = [len(job.indices) for job in jobs]
        places = [batch_places(job.batch_sizes(local), len(job.indices)) for job in jobs]
        self.num_steps = max(map(len, places))
        orders = _shuffled(jobs, draws, num_epochs=1 + max(lane[-1][0] for lane in places))
        starts = np.zeros((self.num_steps, len(jobs), 1), np.int64)
        sizes = np.zeros_like(starts)
        self.alone: list[list[tuple[int, Tensor]]] = [[] for _ in range(self.num_steps)]
        for lane, batches in enumerate(places[:num_jobs]):
            for step, (epoch, start, size) in enumerate(batches):
                first = epoch * max(lengths) + start
                if size == wanted or size < wanted and fills_up:
                    starts[step, lane], sizes[step, lane] = first, size
                else:
                    self.alone[step].append((lane, orders[lane, first : first + size]))
        column, some = np.arange(wanted), np.maximum(sizes, 1)
        at = _to(device, torch.from_numpy(starts + column % some))
        self.batches = orders.expand(self.num_steps, -1, -1).gather(2, at)
        shares = ((column < sizes) / some).astype(np.float32)
        self.shares = _to(device, torch.from_numpy(shares))
        self.num_together = np.count_nonzero(sizes, axis=(1, 2)).tolist()


def _shuffled(jobs: list[Job], draws: Draws, num_epochs: int) -> Tensor:
    """Each lane's pictures in the order of each epoch, int64 [L, num_epochs * longest]."""
    shards = pad_sequence([job.indices for job in jobs], batch_first=True)
    lengths = _to(shards.device, torch.tensor([len(job.indices) for job in jobs]))
    is_present = torch.arange(shards.shape[1], device=shards.device) < lengths[:, None]
    orders = [draws.at(epoch).order(shards.shape[1], is_present) for epoch in range(num_epochs)]
    return torch.cat([shards.gather(1, order) for order in orders], 1)


def _to(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor of the CPU on the device; a GPU copies while both go on."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Lanes:
    """num_lanes rows of weights, gradients, momentum and buffers, and the step of all of them.

    Raises ConfigError for fp16, whose loss scale belongs to a client.
    """

    def __init__(
        self,
        model: FlatModel,
        pictures: Pictures,
        local: Local,
        precision: str,  # fp32, bf16
        num_lanes: int,
        record: Record | None = None,  # how a step is recorded; None: as the device does it
    ):
        if precision == "fp16":
            raise ConfigError("local.lanes: fp16 trains one client at a time; set local.lanes=1")
        self.model, self.pictures, self.local, self.precision = model, pictures, local, precision
        self.num_lanes, device = num_lanes, model.device
        names = model.network.named_parameters(), model.network.named_buffers()
        self.names = [name for named in names for name, _ in named]
        self.has_statistics = not model.frozen and any(
            isinstance(module, nn.BatchNorm2d) for module in model.network.modules()
        )
        self.weights, self.gradients, self.buffers = (
            _rows(num_lanes, vector)
            for vector in (model.parameters, model.gradients, model.buffers)
        )
        self.momentum = torch.zeros_like(self.weights) if local.momentum else None
        self.parameter_views = [v.detach().requires_grad_() for v in model.views(self.weights)]
        self.gradient_views = model.views(self.gradients)
        self.buffer_views = model.buffer_views(self.buffers)
        # vmap would copy tensors whose clients are not neighbours, and BatchNorm change the copies.
        self.stacked_buffers = [torch.zeros(v.shape, device=device) for v in self.buffer_views]
        self.held = [Held() for _ in range(num_lanes)]
        self.corrections: list[Correction | None] = [None] * num_lanes
        self.lr, self.loss = (torch.zeros(num_lanes, 1, device=device) for _ in range(2))
        # What a step reads, besides the rows.
        self.key = torch.zeros(num_lanes, dtype=torch.int64, device=device)
        self.batch = torch.zeros(num_lanes, local.batch_size, dtype=torch.int64, device=device)
        self.share = torch.zeros(num_lanes, local.batch_size, device=device)
        changed = [self.weights, self.buffers, self.loss]
        changed += [] if self.momentum is None else [self.momentum]
        self.graphs = Graphs(changed, record or recorder(device))

    def train(self, jobs: list[Job], stop: Callable[[], bool] = lambda: False) -> list[Trained]:
        """Train 1 to num_lanes clients. Raises Interrupted between two steps if stop() is true."""
        filled = jobs + jobs[:1] * (self.num_lanes - len(jobs))
        self._load(filled)
        device, local = self.model.device, self.local
        seeds = torch.tensor([job.seed for job in filled])
        draws = Draws(_to(device, seeds))
        plan = Plan(filled, draws, local, not self.has_statistics, len(jobs))
        kinds = tuple(correction and correction.kind for correction in self.corrections)
        self.model.train()
        for step in range(plan.num_steps):
            if stop():
                raise Interrupted
            keys = draws.at(step).key
            if together := plan.num_together[step]:
                self.key.copy_(keys)
                self.batch.copy_(plan.batches[step])
                self.share.copy_(plan.shares[step])
                all_active = together == self.num_lanes  # then nothing has to stay as it is
                take_step = partial(self._step_together, all_active)
                self.graphs.run((kinds, all_active), take_step)
            for lane, batch in plan.alone[step]:
                self._step_alone(lane, batch, keys[lane])
        steps = [len(job.batch_sizes(local)) for job in jobs]
        return [
            Trained(
                self.weights[lane, : self.model.parameters.numel()],
                self.buffers[lane, : self.model.buffers.numel()],
                self.loss[lane, 0] / num_steps,
            )
            for lane, num_steps in enumerate(steps)
        ]

    def _load(self, jobs: list[Job]) -> None:
        """Put a job into each lane."""
        for lane, job in enumerate(jobs):
            self.weights[lane, : job.parameters.numel()] = job.parameters
            self.buffers[lane, : job.buffers.numel()] = job.buffers
            self.corrections[lane] = self.held[lane].take(job.correction)
        self.lr.copy_(_to(self.lr.device, torch.tensor([[job.lr] for job in jobs])))
        self.loss.zero_()
        if self.momentum is not None:
            self.momentum.zero_()

    def _step_together(self, all_active: bool) -> None:
        """A step of every lane that has a share in it. Reads and writes this object's tensors."""
        images, labels = self.pictures.train_batch(self.batch, Draws(self.key))
        if self.stacked_buffers:
            torch._foreach_copy_(self.stacked_buffers, self.buffer_views)
        tensors = self.parameter_views, self.stacked_buffers
        with norms_in_fp32(self.model.network):
            logits = vmap(self._logits)(*tensors, images, self.key)
        losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses = (losses.view_as(self.share) * self.share).sum(1, keepdim=True)
        gradients = torch.autograd.grad(losses.sum(), self.parameter_views)
        torch._foreach_copy_(self.gradient_views, gradients)
        is_active = None if all_active else self.share[:, :1] > 0
        vectors = self.weights, self.gradients, self.momentum
        flat_sgd(*vectors, self.lr, self.local, self._correct_all, is_active)
        if self.has_statistics and self.stacked_buffers:
            before = None if all_active else self.buffers.clone()
            torch._foreach_copy_(self.buffer_views, self.stacked_buffers)
            if not all_active:
                self.buffers.copy_(torch.where(is_active, self.buffers, before))
        losses = losses.detach()
        self.loss.add_(losses if all_active else losses.masked_fill(~is_active, 0.0))

    def _step_alone(self, lane: int, batch: Tensor, key: Tensor) -> None:
        """A step of one lane, without vmap: its batch has a size of its own."""
        images, labels = self.pictures.train_batch(batch, Draws(key))
        weights = [view[lane].detach().requires_grad_() for view in self.parameter_views]
        # .data, because autograd must not take one layer's new statistics for another's change.
        buffers = [view[lane].data for view in self.buffer_views]
        loss = cross_entropy(self._logits(weights, buffers, images, key), labels)
        gradient = self.gradients[lane]
        torch._foreach_copy_(self.model.views(gradient), torch.autograd.grad(loss, weights))
        momentum = None if self.momentum is None else self.momentum[lane]
        vectors = self.weights[lane], gradient, momentum
        flat_sgd(*vectors, self.lr[lane], self.local, lambda *_: self._correct(lane))
        self.loss[lane] += loss.detach()

    def _logits(
        self, parameters: list[Tensor], buffers: list[Tensor], images: Tensor, key: Tensor
    ) -> Tensor:
        """Of one client's batch, float32 [B, num_classes]; BatchNorm's statistics move."""
        self.model.use_draws(Draws(key))
        tensors = dict(zip(self.names, [*parameters, *buffers], strict=True))
        with autocast(self.model.device, self.precision):
            return functional_call(self.model.network, tensors, (images,)).float()

    def _correct_all(self, *_: Tensor) -> None:
        for lane in range(self.num_lanes):
            self._correct(lane)

    def _correct(self, lane: int) -> None:
        if self.corrections[lane]:
            size = self.model.parameters.numel()
            self.corrections[lane](self.weights[lane, :size], self.gradients[lane, :size])


@contextmanager
def norms_in_fp32(network: nn.Module) -> Iterator[None]:
    """Within this context norm layers get fp32.

    vmap hands a norm's kernel weights of the dtype of its input. In bf16, CUDA's BatchNorm then
    cannot read its running statistics, which are fp32. GroupNorm has fp32 without vmap, too.
    """
    norms = (m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm))
    to_fp32 = lambda _, inputs: (inputs[0].float(),)  # noqa: E731
    handles = [norm.register_forward_pre_hook(to_fp32) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(num_lanes: int, vector: Tensor) -> Tensor:
    """Zeros for num_lanes such vectors, each of which starts at a multiple of 16 bytes."""
    return vector.new_zeros(num_lanes, -(-vector.numel() // 4) * 4)
