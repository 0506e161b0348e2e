"""Local steps by capability: a slow device trains fewer batches, so that its update is in time.

With FedAvg the average then leans towards the optima of clients that train more steps; FedNova
(Wang et al. 2020, arXiv 2007.07481) weighs the updates such that it does not.
"""

from dataclasses import replace
from functools import cache

import numpy as np

from algorithms import make_algorithm
from config import Config, Local
from federation.densities import MARGIN, Seconds, upload_bytes
from training.local_sgd import batch_sizes, local_of


def num_trained(local: Local, num_examples: np.ndarray) -> np.ndarray:
    """How many examples each client computes gradients of in a round: int64 (clients)."""
    full = takes_full_gradient(local)

    @cache
    def of(num: int, steps: int | None) -> int:
        return num * full + sum(batch_sizes(replace(local, steps=steps), num))

    sizes = enumerate(num_examples.tolist())
    return np.array([of(num, local_of(local, client).steps) for client, num in sizes])


def fit_steps(
    config: Config,
    seconds: Seconds,
    seconds_per_example: np.ndarray,
    num_examples: np.ndarray,
    sizes: np.ndarray,
    num_buffers: int,
) -> Config:
    """The config with the steps of each client after which its update still arrives in time.

    seconds: of each client's download and an upload of so many bytes, if it is alone;
    seconds_per_example, num_examples: float64 and int64 (clients); sizes, num_buffers: as in
    densities.fit_to_deadline(). A client trains at least one step, and no more than the config
    says. The time of an upload at pruning.density is set aside; if densities are fitted too, at
    most half of what the download leaves, and the densities then get all that training leaves.
    """
    if not config.local.fit_deadline:
        return config
    clients = np.arange(len(num_examples))
    left = config.schedule.deadline_seconds - seconds(clients, 0)
    upload = seconds(clients, upload_bytes(config, config.pruning.density, sizes, num_buffers))
    upload = upload - seconds(clients, 0)
    if config.pruning.fit_deadline:
        upload = np.minimum(upload, left / 2)
    with np.errstate(divide="ignore", invalid="ignore"):  # a device that takes no time trains all
        budgets = MARGIN * np.maximum(0.0, left - upload) / seconds_per_example
    if takes_full_gradient(config.local):
        budgets -= num_examples
    trained = [np.cumsum(batch_sizes(config.local, num)) for num in num_examples.tolist()]
    steps = [np.searchsorted(*pair, "right") for pair in zip(trained, budgets, strict=True)]
    steps = np.maximum(1, steps).tolist()
    return replace(config, local=replace(config.local, client_steps=steps))


def takes_full_gradient(local: Local) -> bool:
    """Whether a client looks at all of its examples before its first step."""
    return make_algorithm(local.algorithm, **local.options).takes_full_gradient
