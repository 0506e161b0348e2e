"""data/datasets.py."""

import hashlib
import io
import pickle
import socket
import tarfile
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pictures import corrupt, png_of_16_bits, random_picture, same, write_folder
from helpers.runs import CIFAR10
from PIL import Image

from data import DataError, Dataset, Pictures, datasets, load_dataset

REAL_ZIP = CIFAR10 / "cifar10.zip"


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(DataError, match="'cifar-10'; did you mean 'cifar10'"):
        load_dataset("cifar-10", "data")
    with pytest.raises(DataError, match="'digit'; did you mean 'digits'"):
        load_dataset("cifar10", "data", fallback="digit")


# --- digits -----------------------------------------------------------------------------------


def test_digits_are_split_1437_to_360_with_each_class_in_proportion():
    from sklearn.datasets import load_digits

    digits = load_dataset("digits", "no/such/folder")
    assert digits.train_images.shape == (1437, 8, 8, 3) and digits.train_images.dtype == torch.uint8
    assert digits.test_images.shape == (360, 8, 8, 3)
    assert digits.train_labels.dtype == torch.int64 and digits.class_names == tuple("0123456789")
    train, test = digits.train_labels.bincount(), digits.test_labels.bincount()
    assert ((train + test) / 5 - test).abs().max() < 1
    both = torch.cat([digits.train_images, digits.test_images])
    assert both.max() == 255 and torch.equal(both[..., 0], both[..., 2])
    levels = sorted(map(bytes, both[..., 0].numpy()))
    theirs = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert levels == sorted(map(bytes, theirs))
    assert same(digits, load_dataset("digits", ""))


# --- cifar10 ------------------------------------------------------------------------------------


def test_what_is_not_cifar10_is_not_called_so(tmp_path, capsys):
    write_folder(tmp_path / "part", classes=datasets.CIFAR10_CLASSES, size=(32, 32))
    write_folder(tmp_path / "other")
    assert load_dataset("cifar10", str(tmp_path / "part")).name == "cifar10"
    assert "is not all of CIFAR-10 but 30 + 20 pictures of 32x32 in 10" in capsys.readouterr().err
    assert load_dataset("cifar10", str(tmp_path / "other")).name == "imagefolder"
    assert "loaded as imagefolder" in capsys.readouterr().err


@pytest.fixture
def batches(monkeypatch):
    """Make torchvision take ten pictures of noise for CIFAR-10; return a writer of its files."""
    from torchvision.datasets import CIFAR10

    def entry(number):
        data = np.stack(
            [random_picture(number * 10 + i, (32, 32)).transpose(2, 0, 1) for i in (0, 1)]
        )
        return pickle.dumps({"data": data.reshape(2, 3072), "labels": [number, 9 - number]})

    content = {file: entry(i) for i, (file, _) in enumerate(CIFAR10.train_list + CIFAR10.test_list)}
    content["batches.meta"] = pickle.dumps({"label_names": list(datasets.CIFAR10_CLASSES)})
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for file, data in content.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{file}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    def md5(data):
        return hashlib.md5(data).hexdigest()

    sums = [[file, md5(data)] for file, data in content.items()]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:6])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums[6][1]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive.getvalue()))

    def write(root: Path) -> Path:
        folder = root / "cifar-10-batches-py"
        folder.mkdir()
        for file, data in content.items():
            (folder / file).write_bytes(data)
        return folder

    write.archive = archive.getvalue()
    return write


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        assert socket.getdefaulttimeout() == datasets.DOWNLOAD_TIMEOUT
        raise urllib.error.URLError("no connection")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def test_torchvisions_files_are_read(tmp_path, batches):
    batches(tmp_path)
    data = load_dataset("cifar10", str(tmp_path))
    assert data.name == "cifar10" and data.class_names == datasets.CIFAR10_CLASSES
    assert data.train_images.shape == (10, 32, 32, 3) and data.test_images.shape == (2, 32, 32, 3)
    assert data.train_labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert np.array_equal(data.train_images[2], random_picture(10, (32, 32)))
    batch, _ = Pictures(data, torch.device("cpu")).evaluation_batch("test", 0, 2)
    assert batch.is_contiguous(memory_format=torch.channels_last)  # theirs are not


@pytest.mark.parametrize("file", ["data_batch_3", "batches.meta"])
def test_damaged_torchvision_files_are_named_and_never_replaced(tmp_path, batches, offline, file):
    corrupt(batches(tmp_path) / file)
    with pytest.raises(DataError, match=f"{file}: missing or damaged"):
        load_dataset("cifar10", str(tmp_path), fallback="digits")


def test_interrupted_unpacking_is_finished(tmp_path, batches, offline):
    (batches(tmp_path) / "data_batch_4").unlink()
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(batches.archive)
    assert len(load_dataset("cifar10", str(tmp_path)).train_labels) == 10


def test_a_download_is_unpacked_and_read(tmp_path, batches, monkeypatch, capsys):
    def fetch(url, path):
        Path(path).write_bytes(batches.archive)

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetch)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"truncated by an earlier try")
    data = load_dataset("cifar10", str(tmp_path), fallback="digits")
    assert (data.name, data.fallback_reason, len(data.train_labels)) == ("cifar10", "", 10)
    assert "downloading CIFAR-10" in capsys.readouterr().err


def test_no_download_means_the_fallback_or_an_error(tmp_path, offline, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the default root does not exist
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "cifar-10-python.tar.gz").write_bytes(b"truncated by an earlier try")
    (tmp_path / "odd \udcff").mkdir()
    for root in ("data", str(tmp_path / "empty"), str(tmp_path / "odd \udcff")):
        data = load_dataset("cifar10", root, fallback="digits")
        assert data.fallback_reason.isprintable()
        assert data.name == "digits" and "no connection" in data.fallback_reason
        assert data.fallback_reason.startswith("cifar10 could not be loaded: ")
        with pytest.raises(DataError, match="downloading it failed .*no connection.*; put cifar10"):
            load_dataset("cifar10", root)
    assert socket.getdefaulttimeout() is None


@pytest.mark.skipif(not REAL_ZIP.is_file(), reason="needs ../shared/data/cifar10.zip")
def test_the_real_cifar10(capsys):
    data = load_dataset("cifar10", str(REAL_ZIP))
    assert (data.name, data.class_names) == ("cifar10", datasets.CIFAR10_CLASSES)
    assert data.train_images.shape == (50_000, 32, 32, 3)
    assert data.test_images.shape == (10_000, 32, 32, 3)
    assert data.train_labels.bincount().tolist() == [5000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
    assert capsys.readouterr().err == ""
    started = time.perf_counter()
    assert same(data, load_dataset("cifar10", str(REAL_ZIP.parent)))
    assert time.perf_counter() - started < 5  # from the cache: 0.4 s where nothing else runs
    pictures = Pictures(data, torch.device("cpu"))
    means = -pictures._shift[0, 0] / pictures._scale[0, 0] / 255  # as published everywhere:
    assert torch.allclose(means, torch.tensor([0.4914, 0.4822, 0.4465]), atol=5e-5)
    deviations = 1 / pictures._scale[0, 0] / 255
    assert torch.allclose(deviations, torch.tensor([0.2470, 0.2435, 0.2616]), atol=5e-5)


# --- Hugging Face -------------------------------------------------------------------------------


def hugging_face(splits=("train", "test"), size=(5, 4), label="ClassLabel", labels=(0, 1, 1)):
    import datasets as hf

    kind = hf.ClassLabel(names=["no", "yes"]) if label == "ClassLabel" else hf.Value("int64")
    features = hf.Features({"picture": hf.Image(), "id": hf.Value("int64"), "answer": kind})
    rows = {
        "picture": [Image.fromarray(random_picture(i, size, channels=1)) for i in range(3)],
        "id": [5, 6, 7],
        "answer": list(labels),
    }
    return hf.DatasetDict({split: hf.Dataset.from_dict(rows, features) for split in splits})


def test_hugging_face_folders_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    saved = hugging_face(("train", "validation"))
    saved.save_to_disk(str(tmp_path / "saved"))
    for split in ("train", "validation"):
        saved[split].to_parquet(str(tmp_path / "parquet" / f"{split}.parquet"))
    one = load_dataset(f"hf:{tmp_path / 'saved'}", "data")
    two = load_dataset(str(tmp_path / "parquet"), "data")
    assert same(one, two) and one.name.startswith("hf:")
    assert one.class_names == ("no", "yes") and one.test_labels.tolist() == [0, 1, 1]
    grey = random_picture(2, channels=1)
    assert np.array_equal(one.train_images[2], np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "Value"}, "columns picture, id, answer; it needs .* ClassLabel"),
        ({"splits": ("train",)}, "splits train; it needs train and one of test"),
        ({"labels": (0, -1, 1)}, "pictures without a label"),
        ({"labels": (0, None, 1)}, "pictures without a label"),
    ],
)
def test_hugging_face_sets_that_cannot_be_used(tmp_path, options, message):
    hugging_face(**options).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=message):
        load_dataset(f"hf:{tmp_path / 'saved'}", "data", fallback="digits")


def test_hugging_face_pictures_are_of_one_size(tmp_path):
    import datasets as hf

    splits = {"train": hugging_face()["train"], "test": hugging_face(size=(6, 4))["test"]}
    hf.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="test picture 0 is 6x4 but .*training picture 0 is 5x4"):
        load_dataset(f"hf:{tmp_path / 'saved'}", "data")


def test_hugging_face_pictures_that_lose_bits_are_counted(tmp_path, capsys):
    import datasets as hf

    levels = np.arange(60, dtype=np.uint16).reshape(4, 5, 3) * 1000
    deep = {"bytes": png_of_16_bits(levels), "path": None}
    features = hf.Features({"picture": hf.Image(), "answer": hf.ClassLabel(names=["no", "yes"])})
    rows = {"picture": [Image.fromarray(random_picture(0)), deep], "answer": [0, 1]}
    split = hf.Dataset.from_dict(rows, features)
    hf.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "saved"))
    data = load_dataset(f"hf:{tmp_path / 'saved'}", "data")
    assert np.array_equal(data.test_images[1], levels >> 8)
    said = capsys.readouterr().err
    assert "pictures of more than 8 bits a channel: 2 (" in said and "training picture 1" in said


def test_hugging_face_unreachable_or_damaged(tmp_path, monkeypatch):
    import datasets as hf

    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_dataset(str(tmp_path / "damaged"), "data", fallback="digits")

    def refuse(path):
        raise ConnectionError(f"cannot reach {path}\nmore")

    monkeypatch.setattr(hf, "load_dataset", refuse)
    with pytest.raises(DataError, match="some/set cannot be loaded .cannot reach some/set."):
        load_dataset("hf:some/set", "data")
    data = load_dataset("some/set", "data", fallback="digits")
    assert data.name == "digits" and "\n" not in data.fallback_reason


# --- one's own ------------------------------------------------------------------------------------


def test_a_data_set_is_added_by_a_function_and_a_line(tmp_path, monkeypatch):
    def load_stripes(name: str, root: str) -> Dataset:
        """Load 400 + 100 pictures of stripes that lie across or stand upright."""
        labels = np.arange(500) % 2
        pictures = np.zeros((500, 8, 8, 3), np.uint8)
        pictures[labels == 0, ::2] = 255
        pictures[labels == 1, :, ::2] = 255
        return Dataset.from_arrays(name, pictures, labels, 400, ["across", "upright"])

    monkeypatch.setitem(datasets.LOADERS, "stripes", load_stripes)
    data = load_dataset("stripes", "")
    assert (data.name, data.class_names) == ("stripes", ("across", "upright"))
    assert data.train_images.shape == (400, 8, 8, 3) and len(data.test_labels) == 100
    assert data.train_labels.bincount().tolist() == [200, 200]
    batch, labels = Pictures(data, torch.device("cpu")).evaluation_batch("test", 0, 100)
    assert torch.equal(labels, batch[:, 0, 1, 0].gt(0).long())  # white in row 1: upright
    with pytest.raises(DataError, match="'stripe'; did you mean 'stripes'"):
        load_dataset("stripe", "")
    assert load_dataset("imagefolder", str(tmp_path), fallback="stripes").name == "stripes"
