"""The Dataset: labelled pictures for training and testing, all of them in memory."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .errors import DataError

TENSORS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class Dataset:
    """N training and M test pictures with their labels."""

    name: str  # of the set that was really loaded, which may be a fallback
    train_images: Tensor  # uint8 [N, H, W, 3]
    train_labels: Tensor  # int64 [N]
    test_images: Tensor  # uint8 [M, H, W, 3]
    test_labels: Tensor  # int64 [M]
    class_names: tuple[str, ...]
    fingerprint: str  # SHA-256 (hex) of the pictures, labels and class names, in their order
    fallback_reason: str = ""  # one sentence: why this is not the set that was asked for
    validation_images: Tensor = torch.empty(0)  # uint8 [V, H, W, 3]; made by hold_out()
    validation_labels: Tensor = torch.empty(0)  # int64 [V]

    @classmethod
    def from_arrays(
        cls,
        name: str,
        images: np.ndarray,
        labels: np.ndarray,
        num_train: int,
        class_names: Iterable[str],
    ) -> "Dataset":
        """Make a data set; the first `num_train` pictures are for training, the others for testing.

        images: uint8 [N + M, H, W, 3]. labels: integers [N + M].
        """
        images, labels = np.ascontiguousarray(images), np.asarray(labels, np.int64)
        arrays = (images[:num_train], labels[:num_train], images[num_train:], labels[num_train:])
        tensors = dict(zip(TENSORS, map(torch.from_numpy, arrays), strict=True))
        class_names = tuple(class_names)
        return cls(
            name, **tensors, class_names=class_names, fingerprint=sha256(tensors, class_names)
        )


def sha256(tensors: dict[str, Tensor], class_names: tuple[str, ...]) -> str:
    """Hash the shapes and values of the TENSORS and the class names: equal for equal data only."""
    shapes = [list(tensors[name].shape) for name in TENSORS]
    digest = hashlib.sha256(json.dumps([shapes, class_names]).encode())
    for name in TENSORS:
        digest.update(tensors[name].numpy())
    return digest.hexdigest()


def hold_out(dataset: Dataset, share: float, seed: int) -> Dataset:
    """Move a random share of the training pictures to the validation split.

    Each class gives the same share of its pictures, up to one picture. Raises DataError if no
    pictures would be left for training, or none would be moved.
    """
    labels = dataset.train_labels.numpy()
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class; random within a class
    places = np.floor((np.arange(len(order)) + 1) * share) > np.floor(np.arange(len(order)) * share)
    held = torch.from_numpy(np.sort(order[places]))
    kept = torch.from_numpy(np.sort(order[~places]))
    if not len(held) or not len(kept):
        raise DataError(f"data.validation: {share} of {len(order)} pictures leaves a split empty")
    return replace(
        dataset,
        train_images=dataset.train_images[kept],
        train_labels=dataset.train_labels[kept],
        validation_images=dataset.train_images[held],
        validation_labels=dataset.train_labels[held],
    )
