"""data/records.py."""

import errno
import hashlib
from dataclasses import replace

import numpy as np
import pytest
from helpers.pictures import noise

from data import diversify, partition_labels, save_partition, save_samples

LABELS = np.repeat(np.arange(10), 100)


def split(name, **args):
    return partition_labels(LABELS, 10, name, args, seed=0)


# --- save_partition -------------------------------------------------------------------------------


def test_a_saved_split_can_be_read_back_and_its_sum_is_of_the_split_alone(tmp_path):
    clients = split("inner_dirichlet", alpha=0.1)
    names = tuple("abcdefghij")
    digest = save_partition(tmp_path / "partition.npz", clients, LABELS, names)
    assert digest == save_partition(tmp_path / "other.npz", clients, LABELS, ["?"] * 10)
    assert digest != save_partition(tmp_path / "other.npz", clients[::-1], LABELS, names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.npz", "partition.npz"]
    with np.load(tmp_path / "partition.npz") as arrays:
        indices, offsets = arrays["indices"], arrays["offsets"]
        assert arrays["class_names"].tolist() == list(names)
        counts = [np.bincount(LABELS[part], minlength=10) for part in clients]
        assert np.array_equal(arrays["labels_per_client"], counts)
        assert arrays["labels_per_client"].dtype == np.int64
    assert indices.dtype == offsets.dtype == np.int64 and len(offsets) == 11
    assert all(map(np.array_equal, np.split(indices, offsets[1:-1]), clients))
    content = offsets.astype("<i8").tobytes() + indices.astype("<i8").tobytes()
    assert digest == hashlib.sha256(content).hexdigest()


def test_a_split_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "partition.npz"
    path.write_bytes(b"of before")

    def fill_the_disk(file, **arrays):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        save_partition(path, split("iid"), LABELS, "abcdefghij")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"of before"]


@pytest.mark.parametrize(
    "name", ["\udcff", "caf\xe9", "\U0001f408", "$\\frac{", "two\nlines", "x" * 999]
)
def test_any_class_name_can_be_read(tmp_path, name):
    clients = split("iid")
    names = [name, *"bcdefghij"]
    save_partition(tmp_path / "partition.npz", clients, LABELS, names)
    with np.load(tmp_path / "partition.npz", allow_pickle=False) as arrays:
        assert arrays["class_names"].tolist() == names


# --- save_samples ---------------------------------------------------------------------------------


def read(path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def test_samples_are_a_row_a_picture_with_both_labels(tmp_path):
    data = noise()
    clients = [np.arange(9), np.array([], np.int64), np.array([39])]
    seen = diversify(data, clients, seed=1, noise=0.1, relabelled=1)
    save_samples(tmp_path / "samples.npz", clients, seen, data)
    arrays = read(tmp_path / "samples.npz")
    indices = [0, 1, 2, 3, 4, 5, 6, 8, 39]  # eight of the first client's nine
    assert arrays["client"].tolist() == [0] * 8 + [2]
    assert np.array_equal(arrays["images"], seen.train_images[indices])
    assert np.array_equal(arrays["labels"], seen.train_labels[indices])
    assert np.array_equal(arrays["classes"], data.train_labels[indices])
    assert arrays["client"].dtype == np.int64 and arrays["images"].dtype == np.uint8
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


def test_samples_stay_small(tmp_path):
    data = noise(num_train=400, height=130, width=70)
    clients = np.array_split(np.arange(400), 20)
    save_samples(tmp_path / "samples.npz", clients, data, data)
    arrays = read(tmp_path / "samples.npz")
    assert arrays["images"].shape == (64, 44, 24, 3)  # every third row and column
    assert len(np.unique(arrays["client"])) == 8 and arrays["client"][-1] == 19


@pytest.mark.parametrize("own", [0, 5, 19])
def test_a_client_with_labels_of_its_own_is_among_the_samples(tmp_path, own):
    data = noise(num_train=200)
    clients = np.array_split(np.arange(200), 20)
    labels = data.train_labels.clone()
    labels[clients[own]] = (labels[clients[own]] + 1) % 4
    save_samples(tmp_path / "samples.npz", clients, replace(data, train_labels=labels), data)
    arrays = read(tmp_path / "samples.npz")
    assert len(np.unique(arrays["client"])) == 8 and (np.diff(arrays["client"]) >= 0).all()
    is_own = arrays["labels"] != arrays["classes"]
    assert np.unique(arrays["client"][is_own]).tolist() == [own]
