"""What a run folder keeps of the data: the split over the clients, and some of their pictures."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .dataset import Dataset

NUM_SAMPLED = 8  # of the clients, and of the pictures of each of them, at most
LARGEST_SIDE = 64  # pixels of a picture that is kept


def save_partition(
    path: Path, clients: list[np.ndarray], labels: np.ndarray, class_names: Sequence[str]
) -> str:
    """Write the split to the .npz file `path`, whole or not at all; return its SHA-256 in hex.

    The file holds the arrays
        indices, int64 [N]: the examples of client 0, then those of client 1, and so on;
        offsets, int64 [clients + 1]: where in `indices` each client begins;
        labels_per_client, int64 [clients, classes]: how many examples of each class it has;
        class_names, strings [classes].
    The hash is of offsets and indices as little-endian int64, not of the file.
    """
    indices = np.concatenate(clients).astype("<i8")
    offsets = np.cumsum([0, *map(len, clients)]).astype("<i8")
    counts = [np.bincount(labels[part], minlength=len(class_names)) for part in clients]
    _write(
        Path(path),
        indices=indices,
        offsets=offsets,
        labels_per_client=np.array(counts, np.int64),
        class_names=np.array(class_names, np.str_),
    )
    return hashlib.sha256(offsets.tobytes() + indices.tobytes()).hexdigest()


def save_samples(path: Path, clients: list[np.ndarray], seen: Dataset, dataset: Dataset) -> None:
    """Write some pictures of some clients to the .npz file `path`, whole or not at all.

    seen: the data set as its clients see it, see diversify(). dataset: as the server sees it.

    Up to NUM_SAMPLED clients, and up to as many pictures of each, are spread evenly over all. If
    some clients have labels of their own, one of them is among those chosen. Of pictures larger
    than LARGEST_SIDE only every second, third, ... row and column is kept. The file holds a row for
    each picture in
        client, int64 [S]: its number; in order;
        images, uint8 [S, H, W, 3];
        labels, int64 [S]: the client's label;
        classes, int64 [S]: the server's label.
    """
    is_own = seen.train_labels.numpy() != dataset.train_labels.numpy()
    holders = np.array([client for client, indices in enumerate(clients) if len(indices)])
    relabelled = [is_own[clients[client]].any() for client in holders]
    holders = holders[np.argsort(relabelled, kind="stable")]  # the last one is always chosen
    chosen = {int(client): _spread(clients[client]) for client in sorted(_spread(holders))}
    indices = np.concatenate(list(chosen.values()))
    step = -(-max(seen.train_images.shape[1:3]) // LARGEST_SIDE)
    _write(
        Path(path),
        client=np.repeat(list(chosen), [len(part) for part in chosen.values()]),
        images=seen.train_images.numpy()[indices, ::step, ::step],
        labels=seen.train_labels.numpy()[indices],
        classes=dataset.train_labels.numpy()[indices],
    )


def _spread(values: np.ndarray) -> np.ndarray:
    """Up to NUM_SAMPLED of the values, at even distances."""
    count = min(len(values), NUM_SAMPLED)
    return values[np.linspace(0, len(values) - 1, count).astype(int)]


def _write(path: Path, **arrays: np.ndarray) -> None:
    """Write the arrays to an .npz file beside `path` and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
