"""The engine of a GPU: a client's step is a CUDA graph, recorded once for each size of batch."""

import torch
from torch import Tensor

from config import Local
from data import Pictures
from distributed import Team
from training.correction import Correction, Held
from training.draws import Draws
from training.engines import Engine, TorchEngine, autocast
from training.flat_model import FlatModel
from training.flat_sgd import flat_sgd
from training.graphs import Graphs, Record, recorder


def make_engine(model: FlatModel, local: Local, precision: str, team: Team) -> Engine:
    """What trains one client at a time on the model's device.

    The loss scale of fp16, a team's sums, and any optimizer but SGD need Python between the kernels
    of a step.
    """
    is_recordable = precision != "fp16" and team.size == 1 and local.optimizer == "SGD"
    if model.device.type == "cuda" and is_recordable:
        return GraphEngine(model, local, precision, team)
    return TorchEngine(model, local, precision, team)


class GraphEngine(Engine):
    """Engine.train_batch() on tensors that stay where they are, recorded and replayed.

    It takes no other correction than a Correction, whose tensors it can copy. record: how a step is
    recorded; None: as the device does it.
    """

    def __init__(
        self,
        model: FlatModel,
        local: Local,
        precision: str,  # fp32, bf16
        team: Team,  # of one rank
        record: Record | None = None,
    ):
        self.model, self.local, self.precision, self.team = model, local, precision, team
        self.tensors = list(model.network.parameters())
        self.views = model.views(model.gradients)
        self.momentum = torch.zeros_like(model.parameters) if local.momentum else None
        self.lr = torch.zeros((), device=model.device)
        self.key = torch.zeros((), dtype=torch.int64, device=model.device)
        self.batches: dict[int, Tensor] = {}  # by size
        self.held, self.correction = Held(), None
        changed = [model.parameters, model.buffers]
        changed += [] if self.momentum is None else [self.momentum]
        self.graphs = Graphs(changed, record or recorder(model.device))

    def begin(self, lr: float, correct_gradient: Correction | None) -> None:
        self.lr.fill_(lr)
        self.model.gradients.zero_()
        if self.momentum is not None:
            self.momentum.zero_()
        self.correction = self.held.take(correct_gradient)
        self.kind = correct_gradient and correct_gradient.kind

    def train_batch(self, pictures: Pictures, batch: Tensor, draws: Draws) -> tuple[Tensor, int]:
        held = self.batches.setdefault(len(batch), torch.empty_like(batch))
        held.copy_(batch)
        self.key.copy_(draws.key)
        take_step = super().train_batch
        loss = self.graphs.run(
            (len(batch), self.kind), lambda: take_step(pictures, held, Draws(self.key))[0]
        )
        return loss, 0

    def forward(self, images: Tensor) -> Tensor:
        with autocast(self.model.device, self.precision):
            return self.model.network(images).float()

    def backward(self, loss: Tensor) -> None:
        torch._foreach_copy_(self.views, torch.autograd.grad(loss, self.tensors))

    def step(self) -> int:
        model = self.model
        vectors = model.parameters, model.gradients, self.momentum
        flat_sgd(*vectors, self.lr, self.local, self.correction)
        return 0

    def end(self) -> None:
        """Nothing to free: the graphs go on to use the memory."""
