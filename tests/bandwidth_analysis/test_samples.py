"""bandwidth_analysis/samples.py."""

import numpy as np
import pytest
from helpers.run_folders import write_run

from bandwidth_analysis import AnalysisError, read_run

GOOD = {
    "client": np.array([0, 1, 1]),
    "images": np.zeros((3, 2, 2, 3), np.uint8),
    "labels": np.array([1, 1, 2]),
    "classes": np.array([0, 1, 2]),
}


def test_samples_are_read_where_there_are_any(tmp_path):
    assert read_run(write_run(tmp_path)).samples is None
    samples = read_run(write_run(tmp_path, "diverse", has_samples=True)).samples
    assert samples.client.tolist() == [0, 1, 1] and samples.images.shape == (3, 2, 2, 3)
    assert samples.labels.tolist() == [1, 1, 2] and samples.classes.tolist() == [0, 1, 2]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"[]"], ids=["empty", "half", "a list"])
def test_damaged_samples_are_refused(tmp_path, content):
    folder = write_run(tmp_path, has_samples=True)
    (folder / "samples.npz").write_bytes(content)
    with pytest.raises(AnalysisError, match="samples.npz: damaged or half-written; restore"):
        read_run(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"client": np.array([0, 1, 2])},  # there are two clients
        {"labels": np.array([0, 1, 3])},  # and three classes
        {"classes": np.array([-1, 1, 2])},
        {"classes": np.array([0, 1])},
        {"labels": np.array([0.0, 1, 2])},
        {"images": np.zeros((3, 2, 2, 3))},
        {"images": np.zeros((3, 2, 2), np.uint8)},
        {"images": np.zeros((3, 0, 2, 3), np.uint8)},
    ],
)
def test_samples_of_other_clients_are_refused(tmp_path, change):
    folder = write_run(tmp_path)
    np.savez(folder / "samples.npz", **GOOD | change)
    with pytest.raises(AnalysisError, match="samples.npz: holds no pictures of clients") as caught:
        read_run(folder)
    assert "\n" not in str(caught.value)
