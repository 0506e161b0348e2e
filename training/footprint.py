"""How much memory and work training a batch takes, counted without doing it.

The network runs on torch's meta device, whose tensors have shapes and no content. So the count is
the same on every computer, and takes no time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from training.draws import Draws
from training.flat_model import FlatModel


@dataclass(frozen=True)
class Footprint:
    """Of one batch in float32; flops: floating-point operations of the forward pass."""

    num_bytes: int
    flops: int


def footprint(
    model: FlatModel,  # on the meta device
    batch_size: int,
    image_size: tuple[int, int],
    num_state_vectors: int,  # that the optimizer keeps, see training/engines.py
) -> Footprint:
    """Count parameters, gradients, the optimizer's state, buffers, the batch, what autograd saves.

    A storage that several tensors share counts once. Kernels' workspaces and what PyTorch itself
    takes are left out, since they depend on the device.
    """
    images = torch.zeros(batch_size, 3, *image_size, device="meta")
    labels = torch.zeros(batch_size, dtype=torch.int64, device="meta")
    held = [model.parameters, model.gradients, model.buffers, images, labels]
    held += [torch.zeros_like(model.parameters) for _ in range(num_state_vectors)]

    def hold(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    model.train()
    model.use_draws(Draws.from_seed(0, images.device))
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            loss = cross_entropy(model.network(images), labels)
    storages = {s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in held)}
    del loss  # until here autograd holds the storages, so that no two have the same address
    return Footprint(sum(storages.values()), counter.get_total_flops())
