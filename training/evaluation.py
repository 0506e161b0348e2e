"""Scores: accuracy and loss on held-out pictures, and the accuracy that each client would see.

Clients whose labels differ would also meet different test pictures. A client's accuracy needs no
test set of its own: it is the accuracy of each class, averaged with the client's labels as weights.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from data import Pictures
from distributed import Ranks
from training.engines import autocast
from training.flat_model import FlatModel

SHARED = -1  # in place of a client's number, for a model that all clients share


@torch.no_grad()
def evaluate(
    model: FlatModel, pictures: Pictures, precision: str, split: str, start: int, stop: int
) -> tuple[list[int], float]:
    """Score the model in the network on the pictures start:stop of a split.

    Returns how many pictures of each class were right, and the sum of their losses.
    """
    model.network.eval()
    images, labels = pictures.evaluation_batch(split, start, stop)
    with autocast(model.device, precision):
        logits = model.network(images)
    loss = cross_entropy(logits.float(), labels, reduction="sum")
    right = labels[logits.argmax(1) == labels]
    return torch.bincount(right, minlength=pictures.num_classes).tolist(), float(loss)


def evaluate_models(
    models: list[int],  # [SHARED], or the clients that have a model of their own
    load: Callable[[int], None],  # puts one of these models into `model`
    model: FlatModel,
    pictures: Pictures,
    precision: str,
    batch_size: int,
    ranks: Ranks,
    is_here: Callable[[int], bool],  # whether a client's model is on this rank
    labels_per_client: np.ndarray,  # int64 [num_clients, num_classes]
) -> dict[str, float | None]:
    """The mean scores of the models on every split. They are equal for any number of ranks.

    The batches of a shared model are dealt out to the ranks. A client's own model is evaluated on
    the rank where it is.
    """
    jobs = [
        (split, client, start)
        for split, labels in pictures.labels.items()
        for client in models
        for start in range(0, len(labels), batch_size)
    ]
    mine, loaded = {}, None
    for index, (split, client, start) in enumerate(jobs):
        if index % ranks.size == ranks.rank if client == SHARED else is_here(client):
            if client != loaded:
                load(client)
                loaded = client
            mine[index] = evaluate(model, pictures, precision, split, start, start + batch_size)
    done = {int(i): result for part in ranks.gather_json(mine) for i, result in part.items()}
    scores: dict[str, float | None] = {}
    for split, labels in pictures.labels.items():
        counts = np.bincount(labels.cpu(), minlength=pictures.num_classes)
        right = {client: np.zeros(pictures.num_classes, np.int64) for client in models}
        loss = 0.0
        for index, (tested_split, client, _) in enumerate(jobs):
            if tested_split == split:
                right[client] += done[index][0]
                loss += done[index][1]
        num_tested = len(labels) * len(models)
        scores[f"{split}_accuracy"] = sum(int(r.sum()) for r in right.values()) / num_tested
        scores[f"{split}_loss"] = loss / num_tested if np.isfinite(loss) else None
        if split == "test":
            scores |= _by_client(right, counts, labels_per_client)
    return scores


def _by_client(
    right: dict[int, np.ndarray], counts: np.ndarray, labels_per_client: np.ndarray
) -> dict[str, float]:
    """The mean accuracy over the clients, and over the tenth of the clients with the lowest."""
    if SHARED in right:
        accuracies = client_accuracies(right[SHARED], counts, labels_per_client)
    else:
        accuracies = np.concatenate(
            [client_accuracies(r, counts, labels_per_client[[c]]) for c, r in right.items()]
        )
    worst = np.sort(accuracies)[: -(-len(accuracies) // 10)]
    return {
        "client_accuracy_mean": float(accuracies.mean()),
        "client_accuracy_worst_decile": float(worst.mean()),
    }


def client_accuracies(
    right: np.ndarray, counts: np.ndarray, labels_per_client: np.ndarray
) -> np.ndarray:
    """Each client's accuracy, float64; clients are left out if no class of theirs was tested.

    right, counts: int64 [num_classes], how many test pictures were right, and how many there are;
    labels_per_client: int64 [num_clients, num_classes].
    """
    weights = labels_per_client * (counts > 0)
    weights = weights[weights.sum(1) > 0]
    return weights @ (right / np.maximum(counts, 1)) / weights.sum(1)
