"""HeteroFL's scaler: a narrow network trains with outputs as large as those of the whole one.

Diao et al. 2021 (arXiv 2010.01264, section 3): as with dropout, the outputs are divided by the
share of the channels that is there in training, and left as they are in evaluation.
"""

from torch import Tensor, nn


def scale_outputs(network: nn.Module, width: float) -> None:
    """Divide what convolutions and hidden linear layers put out by the width, in training only.

    width: the network's share of the channels. The last linear layer puts out the logits, which
    are as many in every network, and is not scaled.
    """

    def scale(layer: nn.Module, _: tuple[Tensor], output: Tensor) -> Tensor:
        return output / width if layer.training else output

    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer in layers[:-1] if width < 1 else []:
        layer.register_forward_hook(scale)
