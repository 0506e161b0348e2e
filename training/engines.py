"""What turns a batch's loss into a step: plain PyTorch, on the flat vectors of a FlatModel.

deepspeed_engine.py is the other engine, with the same methods; client.train() uses either.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cnn_model import FlatModel
from config import Local
from distributed import Team

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_SCALE_POWER = 10  # of fp16's loss scale: 2^10

# Corrects the gradient in place, given the weights: after unscaling, before clipping.
Amend = Callable[[Tensor, Tensor], None]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, AUTOCAST[precision], enabled=precision != "fp32")


def clip_gradient(model: FlatModel, max_norm: float) -> Tensor:
    """Scale model.gradients down to max_norm where their norm is more; return the norm."""
    flat = torch.nn.Parameter(model.parameters)
    flat.grad = model.gradients
    return torch.nn.utils.clip_grad_norm_([flat], max_norm)


def make_sgd(parameters: list[torch.nn.Parameter], local: Local) -> torch.optim.SGD:
    """The optimizer of a client."""
    plain = not local.momentum and not local.weight_decay
    return torch.optim.SGD(
        parameters,
        lr=local.lr,
        momentum=local.momentum,
        nesterov=local.nesterov,
        weight_decay=local.weight_decay,
        # A plain step is one pass without it too, and measured faster on a CPU (docs/LOG.md).
        fused=not plain or parameters[0].is_cuda,
    )


class TorchEngine:
    """forward, backward, step for each batch; begin() before a client's first.

    team: the ranks that share each client's batches; their gradients are added up.
    """

    def __init__(self, model: FlatModel, local: Local, precision: str, team: Team):
        self.model, self.precision, self.team, self.clip = model, precision, team, local.clip
        self.tensors = list(model.network.parameters())
        self.views = model.views(model.gradients)
        self.sgd = make_sgd(self.tensors, local)

    def begin(self, lr: float, amend: Amend | None) -> None:
        """Train from what model.parameters holds, without memory of the client before."""
        self.sgd.param_groups[0]["lr"], self.amend = lr, amend
        if self.sgd.param_groups[0]["momentum"]:
            # Fused SGD would leave it uninitialised where the first step overflows (fp16).
            momentum = self.model.views(torch.zeros_like(self.model.parameters))
            for tensor, buffer in zip(self.tensors, momentum, strict=True):
                self.sgd.state[tensor]["momentum_buffer"] = buffer
        device, scale = self.model.device.type, 2.0**FIRST_SCALE_POWER
        self.scaler = torch.amp.GradScaler(device, scale, enabled=self.precision == "fp16")
        # Somebody looks at the whole gradient. Else the step takes each tensor's from where
        # autograd left it, which saves two passes over the vector.
        self.gathers = bool(amend or self.clip or self.team.size > 1 or self.scaler.is_enabled())

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [B, num_classes]."""
        with autocast(self.model.device, self.precision):
            return self.model.network(images).float()

    def backward(self, loss: Tensor, share: float) -> None:
        """The gradient of a mean loss over `share` of the batch; the team has the rest."""
        # Not backward(), which adds: to zero what it adds to would move more bytes.
        gradients = torch.autograd.grad(self.scaler.scale(loss * share), self.tensors)
        if self.gathers:
            torch._foreach_copy_(self.views, gradients)
            self.team.sum_(self.model.gradients)
            gradients = self.views
        for tensor, view, gradient in zip(self.tensors, self.views, gradients, strict=True):
            # Fused SGD reads memory from end to end, in whatever order the strides say it is.
            tensor.grad = gradient if gradient.is_contiguous() else view.copy_(gradient)

    def step(self) -> Tensor | int:
        """Amend, clip and apply the gradient; return 1 if fp16 overflowed and skipped the step."""
        skipped: Tensor | int = 0
        self.scaler.unscale_(self.sgd)
        if self.scaler.is_enabled():
            skipped = ~self.model.gradients.isfinite().all()
        if self.amend:
            self.amend(self.model.parameters, self.model.gradients)
        if self.clip:
            clip_gradient(self.model, self.clip)
        self.scaler.step(self.sgd)
        self.scaler.update()
        self.sgd.zero_grad()  # the next backward() finds their memory, still in the cache
        return skipped

    def end(self) -> None:
        """A client is done: what only training needs makes room for coding its update."""
        self.sgd.state.clear()
        for tensor, view in zip(self.tensors, self.views, strict=True):
            tensor.grad = view
