"""Static batch normalisation: statistics are counted when a model is scored, and not before.

Diao et al. 2021 (HeteroFL, arXiv 2010.01264, section 3). Activations of different widths have
different statistics, which cannot be averaged; so nothing is tracked in training, nothing travels,
and the model that is scored gets statistics of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from data import Pictures
from training.draws import Draws
from training.engines import autocast
from training.flat_model import FlatModel

NUM_BATCHES = 10  # the authors' code goes through all training pictures


@contextmanager
def static_statistics(
    model: FlatModel, pictures: Pictures, precision: str, batch_size: int, seed: int
) -> Iterator[None]:
    """Within this context BatchNorm evaluates with the statistics of the weights in the network.

    They are means over NUM_BATCHES batches of training pictures, the first of an order that the
    seed gives. Every rank counts them for itself, and all get the same.
    """
    layers = [module for module in model.network.modules() if isinstance(module, nn.BatchNorm2d)]
    for layer in layers:
        layer.running_mean = torch.zeros(layer.num_features, device=model.device)
        layer.running_var = torch.ones(layer.num_features, device=model.device)
        layer.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=model.device)
        layer.track_running_stats, layer.momentum = True, None  # None: the mean of all batches
    try:
        _pass_batches(model, pictures, precision, batch_size, seed)
        yield
    finally:
        for layer in layers:
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
            layer.track_running_stats = False


@torch.no_grad()
def _pass_batches(
    model: FlatModel, pictures: Pictures, precision: str, batch_size: int, seed: int
) -> None:
    draws = Draws.from_seed(seed, model.device)
    some = draws.order(pictures.num_train)[: NUM_BATCHES * batch_size]
    model.train()
    for step, batch in enumerate(some.split(max(2, batch_size))):
        if len(batch) == 1:  # which BatchNorm cannot normalise
            break
        images, _ = pictures.train_batch(batch, draws.at(step))
        with autocast(model.device, precision):
            model.network(images)
