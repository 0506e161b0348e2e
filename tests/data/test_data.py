"""data/datasets.py, data/layouts.py and data/augment.py."""

import hashlib
import io
import pickle
import socket
import tarfile
import time
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError, Dataset, Pictures, datasets, hold_out, layouts, load_dataset

REAL_ZIP = Path(__file__).parents[3] / "shared" / "data" / "cifar10.zip"
CLASSES = ("ant", "bee", "cow")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "federated-bytes"


def random_picture(seed: int, size=(5, 4), channels=3) -> np.ndarray:
    shape = (size[1], size[0], channels)[: 3 if channels == 3 else 2]
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_folder(root: Path, classes=CLASSES, size=(5, 4), counts=(("train", 3), ("test", 2))):
    """Pictures of random pixels in root/<split>/<class>/<number>.png."""
    for split, count in counts:
        for kind in classes:
            folder = root / split / kind
            folder.mkdir(parents=True)
            for number in range(count):
                seed = int(hashlib.sha256(f"{split}{kind}{number}".encode()).hexdigest()[:8], 16)
                Image.fromarray(random_picture(seed, size)).save(folder / f"{number}.png")
    return root


def write_zip(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in reversed(sorted(folder.rglob("*"))):  # an order that must not matter
            archive.write(file, file.relative_to(folder))
    return path


def same(one: Dataset, two: Dataset) -> bool:
    tensors = all(torch.equal(getattr(one, key), getattr(two, key)) for key in layouts.TENSORS)
    return tensors and (one.class_names, one.fingerprint) == (two.class_names, two.fingerprint)


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


# --- folders and zips ---------------------------------------------------------------------------


def test_folder_and_zip_give_the_same_arrays_in_sorted_order(tmp_path):
    folder = write_folder(tmp_path / "pictures")
    (folder / "train" / "ant" / ".DS_Store").write_bytes(b"left by a file manager")
    (folder / "train" / "notes.txt").write_text("not a class")
    data = load_dataset("imagefolder", str(folder))
    assert data.name == "imagefolder" and data.class_names == CLASSES
    assert data.train_images.shape == (9, 4, 5, 3) and data.test_images.shape == (6, 4, 5, 3)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    with Image.open(folder / "test" / "bee" / "1.png") as picture:
        assert np.array_equal(data.test_images[3], picture)
    zipped = write_zip(tmp_path / "any.zip", folder)
    assert same(data, load_dataset("imagefolder", str(zipped)))
    folder.rename(tmp_path / "away")
    assert same(data, load_dataset("imagefolder", str(tmp_path)))  # the only zip in the folder


def test_imagefolder_reads_other_formats_and_grey_pictures(tmp_path):
    folder = write_folder(tmp_path / "pictures")
    grey = random_picture(7, channels=1)
    Image.fromarray(grey).save(folder / "train" / "ant" / "a.BMP")
    data = load_dataset("imagefolder", str(folder))
    assert len(data.train_images) == 10
    assert np.array_equal(data.train_images[3], np.repeat(grey[..., None], 3, axis=2))


def test_fingerprint_changes_with_a_pixel_a_label_and_a_name(tmp_path):
    images = np.zeros((4, 2, 2, 3), np.uint8)
    base = layouts.as_fields(images, [0, 1, 0, 1], 2, ["a", "b"])["fingerprint"]
    changed = images.copy()
    changed[3, 1, 1, 2] = 1
    others = [
        layouts.as_fields(changed, [0, 1, 0, 1], 2, ["a", "b"]),
        layouts.as_fields(images, [0, 1, 1, 1], 2, ["a", "b"]),
        layouts.as_fields(images, [0, 1, 0, 1], 2, ["a", "c"]),
        layouts.as_fields(images, [0, 1, 0, 1], 3, ["a", "b"]),
    ]
    assert len({base, *(fields["fingerprint"] for fields in others)}) == 5


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def make_empty_class(folder):
    for file in (folder / "test" / "bee").iterdir():
        file.unlink()


def make_unequal_classes(folder):
    (folder / "test" / "bee").rename(folder / "test" / "wasp")


def make_other_size(folder):
    Image.new("RGB", (6, 4)).save(folder / "train" / "cow" / "9.png")


def make_16_bit(folder):
    Image.fromarray(np.zeros((4, 5), np.uint16)).save(folder / "train" / "cow" / "9.png")


def make_text(folder):
    (folder / "train" / "cow" / "9.png").write_text("not a picture")


def make_truncated(folder):
    file = folder / "train" / "cow" / "1.png"
    file.write_bytes(file.read_bytes()[:60])


def make_corrupt(folder):
    corrupt(folder / "train" / "cow" / "1.png")


def make_no_test(folder):
    (folder / "test").rename(folder / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (make_empty_class, "no pictures in test/bee/"),
        (make_unequal_classes, "class 'bee' is in train/ but not in test/"),
        (make_other_size, "train/cow/9.png is 6x4 but .*train/ant/0.png is 5x4"),
        (make_16_bit, "train/cow/9.png: unreadable picture .more than 8 bits"),
        (make_text, "train/cow/9.png: unreadable"),
        (make_truncated, "train/cow/1.png: unreadable"),
        (make_corrupt, "train/cow/1.png: unreadable"),
        (make_no_test, "no pictures in test/<class>/"),
    ],
)
def test_damaged_sets_are_named_and_never_replaced(tmp_path, damage, message):
    folder = write_folder(tmp_path / "pictures")
    damage(folder)
    zipped = write_zip(tmp_path / "pictures.zip", folder)
    for root in (folder, zipped):
        with pytest.raises(DataError, match=message):
            load_dataset("cifar10", str(root), fallback="digits")


def test_damaged_zips_are_named_and_never_replaced(tmp_path):
    zipped = write_zip(tmp_path / "cifar10.zip", write_folder(tmp_path / "pictures"))
    content = zipped.read_bytes()
    for damaged in (b"", b"text", content[:200], content[:-30], content[:-1]):
        zipped.write_bytes(damaged)
        for root in (zipped, tmp_path):
            with pytest.raises(DataError, match="cifar10.zip: not a zip, or a truncated one"):
                load_dataset("cifar10", str(root), fallback="digits")


def test_places_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="data.root: no such folder or zip: .*nowhere"):
        load_dataset("cifar10", str(tmp_path / "nowhere"), fallback="digits")
    with pytest.raises(DataError, match="data.root: no such folder or zip"):
        load_dataset("imagefolder", str(tmp_path / "x.zip"))
    with pytest.raises(DataError, match="no train/<class>/ and test/<class>/ in"):
        load_dataset("imagefolder", str(tmp_path))
    assert load_dataset("imagefolder", str(tmp_path), fallback="digits").name == "digits"
    folder = write_folder(tmp_path / "pictures")
    write_zip(tmp_path / "one.zip", folder)
    write_zip(tmp_path / "two.zip", folder)
    with pytest.raises(DataError, match="several data sets .one.zip, two.zip."):
        load_dataset("cifar10", str(tmp_path))
    write_zip(tmp_path / "cifar10.zip", folder)
    assert load_dataset("cifar10", str(tmp_path)).class_names == CLASSES


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(DataError, match="'cifar-10'; did you mean 'cifar10'"):
        load_dataset("cifar-10", "data")
    with pytest.raises(DataError, match="'digit'; did you mean 'digits'"):
        load_dataset("cifar10", "data", fallback="digit")


# --- cache --------------------------------------------------------------------------------------


def test_second_load_comes_from_the_cache(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "pictures")
    zipped = write_zip(tmp_path / "pictures.zip", folder)
    first = [load_dataset("imagefolder", str(root)) for root in (folder, zipped)]
    monkeypatch.setattr(layouts, "_decode", None)
    for root, data in zip((folder, zipped), first, strict=True):
        assert same(data, load_dataset("imagefolder", str(root)))


def test_an_altered_set_is_decoded_again(tmp_path):
    folder = write_folder(tmp_path / "pictures")
    zipped = write_zip(tmp_path / "pictures.zip", folder)
    for root in (folder, zipped):
        load_dataset("imagefolder", str(root))
    file = folder / "train" / "ant" / "0.png"
    Image.fromarray(random_picture(99)).save(file)
    changed = load_dataset("imagefolder", str(folder))
    assert np.array_equal(changed.train_images[0], random_picture(99))
    # One byte of a stored picture, with directory and size as they were.
    content = bytearray(zipped.read_bytes())
    content[content.index(b"IDAT") + 6] ^= 255
    zipped.write_bytes(content)
    with pytest.raises(DataError, match=r"pictures.zip: (train|test)/\w+/\d.png: unreadable"):
        load_dataset("imagefolder", str(zipped))


@pytest.mark.parametrize("file", ["train_images.npy", "test_labels.npy", "meta.json"])
@pytest.mark.parametrize(
    "damage",
    [corrupt, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-3])],
    ids=["flipped", "missing", "truncated"],
)
def test_a_damaged_cache_is_rebuilt(tmp_path, cache, file, damage, monkeypatch):
    folder = write_folder(tmp_path / "pictures")
    first = load_dataset("imagefolder", str(folder))
    damage(next(cache.glob(f"*/{file}")))
    assert same(first, load_dataset("imagefolder", str(folder)))
    monkeypatch.setattr(layouts, "_decode", None)  # and now it is whole again
    assert same(first, load_dataset("imagefolder", str(folder)))
    assert len(list(cache.iterdir())) == 1


def test_without_a_writable_cache_there_is_a_warning_and_no_cache(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    data = load_dataset("imagefolder", str(write_folder(tmp_path / "pictures")))
    assert len(data.train_images) == 9
    assert "warning: decoded pictures not cached" in capsys.readouterr().err


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
    for root in ("data", str(tmp_path / "empty")):
        data = load_dataset("cifar10", root, fallback="digits")
        assert data.name == "digits" and "no connection" in data.fallback_reason
        assert data.fallback_reason.startswith("cifar10 could not be had: ")
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


# --- Pictures -----------------------------------------------------------------------------------


def noise(num_train=40, num_test=7, height=6, width=5) -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_train + num_test, height, width, 3), dtype=np.uint8)
    labels = rng.integers(0, 4, num_train + num_test)
    return Dataset("noise", **layouts.as_fields(images, labels, num_train, "abcd"))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normalised(data: Dataset, images: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, 3] to float [B, 3, H, W], the slow way."""
    pixels = data.train_images.numpy().reshape(-1, 3) / 255
    return ((images / 255 - pixels.mean(0)) / pixels.std(0)).transpose(0, 3, 1, 2)


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (2, False), (0, True), (4, True)])
def test_batches_equal_a_loop_over_pictures(padding, flip):
    data = noise()
    pictures = Pictures(data, torch.device("cpu"), padding, flip)
    indices = torch.tensor([0, 39, 3, 3, 17, 38])
    batch, labels = pictures.train_batch(indices, generator(5))

    draws = generator(5)
    offsets = torch.zeros(2, 6, dtype=torch.int64)
    if padding:
        offsets = torch.randint(2 * padding + 1, (2, 6), generator=draws)
    mirrored = torch.randint(2, (6,), generator=draws) if flip else torch.zeros(6)
    expected = []
    for i, y, x, mirror in zip(indices, *offsets.tolist(), mirrored, strict=True):
        frame = np.zeros((6 + 2 * padding, 5 + 2 * padding, 3), np.uint8)
        frame[padding : padding + 6, padding : padding + 5] = data.train_images[i]
        crop = frame[y : y + 6, x : x + 5]
        expected.append(crop[:, ::-1] if mirror else crop)
    np.testing.assert_allclose(batch, normalised(data, np.stack(expected)), atol=1e-6)
    assert torch.equal(labels, data.train_labels[indices])
    assert batch.dtype == torch.float32 and batch.shape == (6, 3, 6, 5)
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_test_batches_are_normalised_and_nothing_else():
    data = noise()
    batch, labels = Pictures(data, torch.device("cpu")).evaluation_batch("test", 2, 6)
    np.testing.assert_allclose(batch, normalised(data, data.test_images[2:6].numpy()), atol=1e-6)
    assert torch.equal(labels, data.test_labels[2:6])
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_channels_may_come_first_in_memory():
    pictures = Pictures(noise(), torch.device("cpu"), channels_last=False)
    batch, _ = pictures.train_batch(torch.arange(6), generator(5))
    expected, _ = Pictures(noise(), torch.device("cpu")).train_batch(torch.arange(6), generator(5))
    assert batch.is_contiguous() and torch.equal(batch, expected)


def test_attributes_and_normalisation_of_digits():
    digits = load_dataset("digits", "")
    pictures = Pictures(digits, torch.device("cpu"), padding=0, flip=False)
    assert (pictures.num_classes, pictures.image_size) == (10, (8, 8))
    assert (pictures.num_train, len(pictures.labels["test"])) == (1437, 360)
    before = generator(3)
    batch, _ = pictures.train_batch(torch.arange(1437), before)
    assert torch.equal(before.get_state(), generator(3).get_state())  # nothing was drawn
    assert batch.double().mean((0, 2, 3)).abs().max() < 1e-6
    assert (batch.double().std((0, 2, 3), correction=0) - 1).abs().max() < 1e-6


def test_a_channel_of_one_level_becomes_zero():
    fields = layouts.as_fields(np.full((3, 4, 4, 3), 77, np.uint8), [0, 1, 0], 2, "ab")
    pictures = Pictures(Dataset("flat", **fields), torch.device("cpu"), padding=0)
    batch, _ = pictures.train_batch(torch.arange(2), generator(0))
    assert torch.equal(batch, torch.zeros(2, 3, 4, 4))


def test_a_seed_gives_a_batch_and_leaves_the_global_generator_alone():
    pictures = Pictures(noise(), torch.device("cpu"))
    indices = torch.arange(40)
    state = torch.get_rng_state()
    one, two, other = (pictures.train_batch(indices, generator(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


def test_all_crops_and_mirrors_are_equally_likely():
    picture = np.arange(1, 17, dtype=np.uint8).reshape(1, 4, 4, 1).repeat(3, axis=3)
    fields = layouts.as_fields(np.concatenate([picture, picture]), [0, 0], 1, "a")
    pictures = Pictures(Dataset("one", **fields), torch.device("cpu"), padding=1)
    count = 18_000
    batch, _ = pictures.train_batch(torch.zeros(count, dtype=torch.int64), generator(0))
    found, counts = batch.flatten(1).unique(dim=0, return_counts=True)
    assert len(found) == 3 * 3 * 2
    assert (counts - count / 18).abs().max() < 5 * (count / 18) ** 0.5


def test_the_data_set_is_left_as_it_was():
    data = noise()
    copy = data.train_images.clone(), data.test_images.clone()
    pictures = Pictures(data, torch.device("cpu"))
    pictures.train_batch(torch.arange(40), generator(0))
    pictures.evaluation_batch("test", 0, 7)
    assert torch.equal(copy[0], data.train_images) and torch.equal(copy[1], data.test_images)


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("index", [-1, 40])
def test_no_picture_before_the_first_or_beyond_the_last_is_served(padding, index):
    pictures = Pictures(noise(), torch.device("cpu"), padding)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        pictures.train_batch(torch.tensor([index]), generator(0))


# --- crops and a validation split -----------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 1])
def test_crops_of_every_offset_are_cut_from_training_pictures(padding):
    data = noise(num_train=2)
    pictures = Pictures(data, torch.device("cpu"), padding, flip=False, crop=4)
    assert pictures.image_size == (4, 4)
    batch, _ = pictures.train_batch(torch.zeros(2000, dtype=torch.int64), generator(0))
    frame = np.pad(data.train_images[0].numpy(), ((padding,) * 2, (padding,) * 2, (0, 0)))
    rows, columns = 6 + 2 * padding - 3, 5 + 2 * padding - 3
    crops = [frame[y : y + 4, x : x + 4] for y in range(rows) for x in range(columns)]
    expected = torch.from_numpy(normalised(data, np.stack(crops))).float().flatten(1)
    found = batch.flatten(1)
    nearest = torch.cdist(found, expected, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert nearest.values.max() < 1e-4 and len(nearest.indices.unique()) == rows * columns


def test_of_a_picture_that_is_evaluated_the_centre_is_cut():
    data = noise()
    batch, _ = Pictures(data, torch.device("cpu"), crop=3).evaluation_batch("test", 2, 6)
    expected = normalised(data, data.test_images[2:6, 1:4, 1:4].numpy())
    np.testing.assert_allclose(batch, expected, atol=1e-6)


def test_a_crop_larger_than_the_pictures_is_refused():
    with pytest.raises(DataError, match="data.crop: 6 is more than the pictures have, 6x5"):
        Pictures(noise(), torch.device("cpu"), crop=6)


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


def test_validation_pictures_come_as_a_split_of_their_own():
    split = hold_out(noise(), 0.25, seed=0)
    pictures = Pictures(split, torch.device("cpu"))
    assert list(pictures.labels) == ["test", "validation"] and pictures.num_train == 30
    batch, labels = pictures.evaluation_batch("validation", 0, 100)
    expected = normalised(split, split.validation_images.numpy())
    np.testing.assert_allclose(batch, expected, atol=1e-6)
    assert torch.equal(labels, split.validation_labels)
