"""data/dataset.py."""

import numpy as np
import pytest
import torch
from helpers.pictures import noise

from data import DataError, Dataset, hold_out


def fingerprint(*arrays) -> str:
    return Dataset.from_arrays("any", *arrays).fingerprint


def test_fingerprint_changes_with_a_pixel_a_label_and_a_name():
    images = np.zeros((4, 2, 2, 3), np.uint8)
    base = fingerprint(images, [0, 1, 0, 1], 2, "ab")
    changed = images.copy()
    changed[3, 1, 1, 2] = 1
    others = [
        fingerprint(changed, [0, 1, 0, 1], 2, "ab"),
        fingerprint(images, [0, 1, 1, 1], 2, "ab"),
        fingerprint(images, [0, 1, 0, 1], 2, "ac"),
        fingerprint(images, [0, 1, 0, 1], 3, "ab"),
    ]
    assert len({base, *others}) == 5


def test_held_out_pictures_are_the_same_share_of_each_class():
    data = noise(num_train=400)
    split = hold_out(data, 0.1, seed=3)
    labels = data.train_labels.numpy()
    for label in range(4):
        held = int((split.validation_labels == label).sum())
        assert abs(held - 0.1 * (labels == label).sum()) < 1
    assert len(split.validation_labels) == 40 and len(split.train_labels) == 360
    both = torch.cat([split.train_images, split.validation_images]).flatten(1)
    assert torch.equal(both.unique(dim=0), data.train_images.flatten(1).unique(dim=0))
    assert torch.equal(split.test_images, data.test_images)
    again, other = hold_out(data, 0.1, seed=3), hold_out(data, 0.1, seed=4)
    assert torch.equal(again.validation_images, split.validation_images)
    assert not torch.equal(other.validation_images, split.validation_images)


def test_a_split_that_leaves_a_side_empty_is_refused():
    with pytest.raises(DataError, match="data.validation: 0.1 of 4 pictures"):
        hold_out(noise(num_train=4), 0.1, seed=0)
