"""Scores: accuracy and loss on held-out pictures, and the accuracy that each client would see.

Clients that differ in their labels would each meet other test pictures. Their accuracy needs no
test set of their own: it is the accuracy of each class, averaged by the client's labels.
"""

from collections.abc import Callable

import numpy as np

from cnn_model import FlatModel
from data import Pictures
from distributed import Ranks
from training.local_sgd import evaluate

SHARED = -1  # stands for a client where all have the same model


def evaluate_models(
    models: list[int],  # SHARED, or clients with a model of their own
    load: Callable[[int], None],  # puts one of them into `model`
    model: FlatModel,
    pictures: Pictures,
    precision: str,
    batch_size: int,
    ranks: Ranks,
    is_here: Callable[[int], bool],  # whether a client's model is on this rank
    labels_per_client: np.ndarray,  # int64 [num_clients, num_classes]
) -> dict[str, float | None]:
    """The mean scores of the models, on every split; equal for any number of ranks.

    The batches of a shared model are dealt out to the ranks; a client's model stays on its rank.
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
        for index, (of, client, _) in enumerate(jobs):
            if of == split:
                right[client] += done[index][0]
                loss += done[index][1]
        tested = len(labels) * len(models)
        scores[f"{split}_accuracy"] = sum(int(r.sum()) for r in right.values()) / tested
        scores[f"{split}_loss"] = loss / tested if np.isfinite(loss) else None
        if split == "test":
            scores |= _by_client(right, counts, labels_per_client)
    return scores


def _by_client(
    right: dict[int, np.ndarray], counts: np.ndarray, labels_per_client: np.ndarray
) -> dict[str, float]:
    """The mean over the clients, and over the tenth of them that is worst off."""
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
    """float64 [num_clients], without those that have no label that was tested.

    right, counts: int64 [num_classes], of the test pictures; labels_per_client: int64
    [num_clients, num_classes].
    """
    weights = labels_per_client * (counts > 0)
    weights = weights[weights.sum(1) > 0]
    return weights @ (right / np.maximum(counts, 1)) / weights.sum(1)
