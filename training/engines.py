"""How a batch becomes a step: plain PyTorch on the flat vectors of a FlatModel.

deepspeed_engine.py holds another engine; local_sgd.py uses either.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from config import Local
from data import Pictures
from distributed import Team
from training.draws import Draws
from training.flat_model import FlatModel
from training.fp16_on_cpu import fp16_on_cpu

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_SCALE_POWER = 10  # fp16 multiplies the loss by 2^10 at first

# correct_gradient(weights, gradient) corrects a batch's gradient in place: after fp16's scale has
# been taken out, before clipping. Both are aligned vectors of the model (FlatModel.aligned).
CorrectGradient = Callable[[Tensor, Tensor], None]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Where a network's forward pass is computed in this precision; its parameters stay fp32."""
    if precision == "fp16" and device.type == "cpu":
        return fp16_on_cpu()
    return torch.autocast(device.type, AUTOCAST[precision], enabled=precision != "fp32")


def clip_gradient(model: FlatModel, max_norm: float) -> Tensor:
    """Scale model.gradients down to max_norm if their norm is larger; return the norm."""
    norm = torch.nn.utils.get_total_norm([model.gradients])
    # Tensor by tensor, because a norm that is NaN must not spread to the gaps between them.
    torch.nn.utils.clip_grads_with_norm_(model.network.parameters(), max_norm, norm)
    return norm


def make_optimizer(parameters: list[torch.nn.Parameter], local: Local) -> torch.optim.Optimizer:
    """The optimizer of a client; federation/compatibility.py has checked its name and options."""
    if local.optimizer != "SGD":
        cls = getattr(torch.optim, local.optimizer)
        return cls(parameters, lr=local.lr, **local.optimizer_options)
    return torch.optim.SGD(
        parameters,
        lr=local.lr,
        momentum=local.momentum,
        nesterov=local.nesterov,
        weight_decay=local.weight_decay,
        fused=True,
    )


def num_state_vectors(local: Local) -> int:
    """How many vectors as long as the model the optimizer keeps while a client trains."""
    trial = torch.nn.Parameter(torch.zeros(2, 3))
    trial.grad = torch.zeros_like(trial)
    optimizer = make_optimizer([trial], local)
    optimizer.step()
    kept = filter(torch.is_tensor, optimizer.state[trial].values())
    return sum(tensor.shape == trial.shape for tensor in kept)


class Engine(ABC):
    """Call begin() before a client's first batch, train_batch() for each, and end() after its last.

    team: the ranks that share each client's batches; their gradients are added up.
    """

    model: FlatModel
    team: Team

    @abstractmethod
    def begin(self, lr: float, correct_gradient: CorrectGradient | None) -> None:
        """Train from what model.parameters holds, without memory of the client before."""

    def train_batch(
        self, pictures: Pictures, batch: Tensor, draws: Draws
    ) -> tuple[Tensor, Tensor | int]:
        """One step on the pictures at `batch`, int64 [B]; draws: this step's.

        Returns this rank's part of the batch's mean loss, and 1 if fp16 skipped the step.
        """
        images, labels = pictures.train_batch(batch, draws)
        share = 1.0
        if self.team.size > 1:
            mine, share = self._part(len(batch))
            images, labels = images[mine], labels[mine]
            # The ranks of a team see different pictures of a batch: each drops out on its own.
            draws = Draws(draws.key + self.team.rank)
        self.model.use_draws(draws)
        loss = cross_entropy(self.forward(images), labels)
        if self.team.size > 1:
            loss = loss * share
        self.backward(loss)
        return loss.detach(), self.step()

    def _part(self, size: int) -> tuple[slice, float]:
        """Which pictures of a batch of this size are this rank's, and their share of its loss."""
        team = self.team
        if team.rank >= size:  # beyond the end of a small batch: a picture that does not count
            return slice(1), 0.0
        mine = slice(team.rank, None, team.size)
        return mine, len(range(size)[mine]) / size

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [B, num_classes]."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Compute the batch's gradient; `loss` is this rank's part of the loss, float32 []."""

    @abstractmethod
    def step(self) -> Tensor | int:
        """Decay, correct, clip and apply the gradient; return 1 if fp16 overflowed instead."""

    @abstractmethod
    def end(self) -> None:
        """The client's last batch is done."""


class TorchEngine(Engine):
    """Plain PyTorch: autograd and an optimizer of torch.optim.

    Attribute kept: where local.optimizer_state is kept, what a client's optimizer goes on from at
    begin(), {} at first, and what it has come to at end(), by parameter and name.
    """

    def __init__(self, model: FlatModel, local: Local, precision: str, team: Team):
        self.model, self.precision, self.team, self.clip = model, precision, team, local.clip
        self.local = local
        self.tensors = list(model.network.parameters())
        self.views = model.views(model.gradients)
        self.optimizer = make_optimizer(self.tensors, local)
        self.kept: dict[str, Tensor] = {}

    def begin(self, lr: float, correct_gradient: CorrectGradient | None) -> None:
        self.correct_gradient, self.decay = correct_gradient, 0.0
        if self.local.optimizer == "SGD":
            self._begin_sgd()
        else:  # a new one: some, such as Adagrad, have a state before their first step
            self.optimizer = make_optimizer(self.tensors, self.local)
            if self.kept:
                self._load_kept()
        self.optimizer.param_groups[0]["lr"] = lr
        device, scale = self.model.device.type, 2.0**FIRST_SCALE_POWER
        self.scaler = torch.amp.GradScaler(device, scale, enabled=self.precision == "fp16")
        # Each of these needs the whole gradient in one vector. Otherwise the step takes each
        # tensor's gradient from where autograd left it, which saves two passes over the vector.
        needs_vector = correct_gradient or self.clip or self.team.size > 1
        self.gathers = bool(needs_vector or self.scaler.is_enabled())
        if self.gathers:
            self.model.gradients.zero_()
        self._drop_gradients()
        more = self.local.momentum or self.optimizer.param_groups[0]["weight_decay"]
        self.is_plain = self.local.optimizer == "SGD" and not (more or self.scaler.is_enabled())

    def _begin_sgd(self) -> None:
        """Clear the momentum, and say who adds the weight decay.

        The order of a step is decay, correct, clip, momentum: a correction is of the gradient of
        what the client minimises, weight decay included. torch's SGD adds the decay after both, so
        where there is one of them, step() adds it first.
        """
        group, weight_decay = self.optimizer.param_groups[0], self.local.weight_decay
        if group["momentum"]:
            # Fused SGD would leave the momentum uninitialised if fp16 overflows in the first step.
            momentum = self.model.views(torch.zeros_like(self.model.parameters))
            for tensor, buffer in zip(self.tensors, momentum, strict=True):
                self.optimizer.state[tensor]["momentum_buffer"] = buffer
        self.decay = weight_decay if self.correct_gradient or self.clip else 0.0
        group["weight_decay"] = weight_decay - self.decay

    def _load_kept(self) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in self.kept.items():
            _, number, name = key.split(".")
            state.setdefault(int(number), {})[name] = tensor.clone()  # steps write to it
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def forward(self, images: Tensor) -> Tensor:
        with autocast(self.model.device, self.precision):
            return self.model.network(images).float()

    def backward(self, loss: Tensor) -> None:
        if not self.gathers:  # the tensors have no gradients yet, so that autograd's become theirs
            loss.backward()
            return
        # Tensor.backward() would add to what is there; setting that to zero moves more bytes.
        gradients = torch.autograd.grad(self.scaler.scale(loss), self.tensors)
        torch._foreach_copy_(self.views, gradients)
        self.team.sum_(self.model.gradients)
        for tensor, view in zip(self.tensors, self.views, strict=True):
            tensor.grad = view

    def step(self) -> Tensor | int:
        skipped: Tensor | int = 0
        self.scaler.unscale_(self.optimizer)
        if self.scaler.is_enabled():
            # As the scaler sees it, in one pass: both ends are NaN if any entry is.
            least, largest = self.model.gradients.aminmax()
            skipped = ~(least.isfinite() & largest.isfinite())
        if self.decay:
            self.model.gradients.add_(self.model.parameters, alpha=self.decay)
        if self.correct_gradient:
            self.correct_gradient(self.model.parameters, self.model.gradients)
        if self.clip:
            clip_gradient(self.model, self.clip)
        if self.is_plain:
            self._subtract_gradient()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self._drop_gradients()  # the next backward() finds their memory, still in the cache
        return skipped

    def _drop_gradients(self) -> None:
        """What zero_grad() of an optimizer does, without what torch does around it."""
        for tensor in self.tensors:
            tensor.grad = None

    @torch.no_grad()
    def _subtract_gradient(self) -> None:
        """A step of SGD without momentum and decay, without what torch.optim does around it.

        That takes a fiftieth of a step of pfl's network on a CPU (docs/LOG.md).
        """
        gradients = [tensor.grad for tensor in self.tensors]
        lr = self.optimizer.param_groups[0]["lr"]
        torch._foreach_add_(self.tensors, gradients, alpha=-lr)

    def end(self) -> None:
        """Free the memory that only training needs, before the client's update is encoded."""
        if self.local.optimizer_state == "kept":
            self.kept = {
                f"optimizer.{number}.{name}": tensor
                for number, tensors in self.optimizer.state_dict()["state"].items()
                for name, tensor in tensors.items()
            }
        self.optimizer.state.clear()
        for tensor, view in zip(self.tensors, self.views, strict=True):
            tensor.grad = view
