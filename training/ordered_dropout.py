"""FjORD's ordered dropout: each batch trains a width that is drawn anew.

Horvath et al. 2021 (arXiv 2102.13451, section 3): the widths up to the client's own are equally
likely, and a narrower network consists of the first channels of each layer. There is no
distillation from the client's own width to the narrower ones.
"""

from torch import Tensor
from torch.func import functional_call

from config import Local
from data import Pictures
from distributed import Team
from training.draws import Draws
from training.engines import CorrectGradient, TorchEngine, autocast
from training.flat_model import FlatModel


class OrderedDropoutEngine(TorchEngine):
    """Plain PyTorch in which autograd fills the gradient of the channels left out with zeros.

    narrower: models of the narrower widths, of which only the structure is used. A CUDA graph
    holds one structure, so on a GPU this is slower than what trains one width.
    """

    def __init__(
        self, model: FlatModel, local: Local, precision: str, team: Team, narrower: list[FlatModel]
    ):
        super().__init__(model, local, precision, team)
        self.models = [model, *narrower]
        self.drawn = model

    def begin(self, lr: float, correct_gradient: CorrectGradient | None) -> None:
        super().begin(lr, correct_gradient)
        for model in self.models:
            model.train()

    def train_batch(
        self, pictures: Pictures, batch: Tensor, draws: Draws
    ) -> tuple[Tensor, Tensor | int]:
        # Which network runs is Python's choice: on a GPU it waits for this number.
        self.drawn = self.models[int(draws.below(len(self.models), 1, "width"))]
        self.drawn.use_draws(Draws(draws.key + self.team.rank))
        return super().train_batch(pictures, batch, draws)

    def forward(self, images: Tensor) -> Tensor:
        network = self.drawn.network
        named = zip(network.named_parameters(), self.tensors, strict=True)
        prefixes = {name: whole[tuple(map(slice, part.shape))] for (name, part), whole in named}
        with autocast(self.model.device, self.precision):
            return functional_call(network, prefixes, (images,)).float()
