"""Load a data set by its name: cifar10, digits, imagefolder, or one from Hugging Face.

A data set that is absent and cannot be downloaded may be replaced by a `fallback`; the result says
so. A data set that is there but damaged is never replaced: it raises DataError.
"""

import difflib
import http.client
import io
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from .dataset import Dataset
from .errors import DataError, printable, say
from .layouts import describe_truncated, has_deep_colour, read_layout, stack_pictures, to_rgb
from .sources import find_source

DEFAULT_ROOT = "data"
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
# The suffixes that torchvision.datasets.ImageFolder reads.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
DOWNLOAD_TIMEOUT = 10.0  # seconds to wait for an answer from the server


class _Unavailable(DataError):
    """The data set is absent and cannot be downloaded. Only then does a fallback replace it."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"{reason}; {remedy}")
        self.reason = printable(reason)


def load_dataset(name: str, root: str, fallback: str = "") -> Dataset:
    """Load the data set `name`: cifar10, digits, imagefolder, or a Hugging Face name or path.

    root: the folder or zip that holds cifar10 or imagefolder; the other data sets do not use it.
    fallback: the data set to load if `name` is absent and cannot be downloaded; "" means none.

    Raises DataError if the name is unknown, if `root` does not exist (the default root may be
    missing, since a download creates it), if the data set is absent and has no fallback, and if
    pictures are damaged or differ in size.
    """
    if fallback:
        _find_loader(fallback)  # a misspelt fallback is an error even when it is not needed
    try:
        return _load(name, root)
    except _Unavailable as error:
        if not fallback:
            raise
        reason = f"{name} could not be loaded: {error.reason}"
        return replace(_load(fallback, root), fallback_reason=reason)


def _load(name: str, root: str) -> Dataset:
    try:
        return _find_loader(name)(name, root)
    except (OSError, MemoryError) as error:
        raise DataError(f"data.root: {root} cannot be read: {error}") from error


def _find_loader(name: str) -> Callable[[str, str], Dataset]:
    if name in LOADERS:
        return LOADERS[name]
    if name.startswith("hf:") or "/" in name:
        return _load_huggingface
    near = difflib.get_close_matches(name, LOADERS, n=1, cutoff=0)[0]
    raise DataError(
        f"data.name: no data set {name!r}; did you mean {near!r}? "
        f"There are {', '.join(LOADERS)} and Hugging Face names such as hf:uoft-cs/cifar100"
    )


# --- cifar10 (Krizhevsky 2009, Learning multiple layers of features from tiny images) -----------


def _load_cifar10(name: str, root: str) -> Dataset:
    folder = Path(os.path.expanduser(root))
    if (folder / "cifar-10-batches-py").is_dir():
        return _read_cifar10_batches(name, folder)
    source = find_source(folder)
    if source is None:
        _check_root(root, folder)
        _download_cifar10(folder)
        return _read_cifar10_batches(name, folder)
    found = read_layout(name, source, (".png",))
    return replace(found, name=_check_cifar10(source.path, found))


def _check_cifar10(path: Path, found: Dataset) -> str:
    """Return the name to report, since only CIFAR-10 may be called cifar10 in a table."""
    num_train, height, width, _ = found.train_images.shape
    num_test, num_classes = len(found.test_labels), len(found.class_names)
    is_cifar10 = (height, width) == (32, 32) and found.class_names == CIFAR10_CLASSES
    name = "cifar10" if is_cifar10 else "imagefolder"
    if not is_cifar10 or (num_train, num_test) != (50_000, 10_000):
        say(
            f"warning: {path} is not all of CIFAR-10 but {num_train} + {num_test} pictures of "
            f"{width}x{height} in {num_classes} classes; loaded as {name}"
        )
    return name


def _check_root(root: str, folder: Path) -> None:
    """Refuse a root that does not exist: it is mistyped, and no fallback should hide that."""
    if root != DEFAULT_ROOT and not folder.exists():
        raise DataError(f"data.root: no such folder or zip: {root}; correct it or create it")


def _read_cifar10_batches(name: str, folder: Path) -> Dataset:
    """Read the files of CIFAR-10 as torchvision stores them, if their MD5 sums are right."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    batches = folder / CIFAR10.base_folder
    sums = [
        *CIFAR10.train_list,
        *CIFAR10.test_list,
        [CIFAR10.meta["filename"], CIFAR10.meta["md5"]],
    ]
    damaged = [batches / file for file, md5 in sums if not check_integrity(batches / file, md5)]
    if damaged and not check_integrity(folder / CIFAR10.filename, CIFAR10.tgz_md5):
        raise DataError(f"{damaged[0]}: missing or damaged; delete {batches} to download it again")
    # If the archive beside the files is sound, unpacking it was interrupted. `download` unpacks it
    # once more and downloads nothing.
    train = CIFAR10(folder, train=True, download=bool(damaged))
    test = CIFAR10(folder, train=False)
    images, labels = np.concatenate([train.data, test.data]), train.targets + test.targets
    return Dataset.from_arrays(name, images, labels, len(train.data), train.classes)


def _download_cifar10(folder: Path) -> None:
    """Let torchvision download CIFAR-10 and unpack it, replacing what an earlier try left."""
    from torchvision.datasets import CIFAR10

    say(f"downloading CIFAR-10 (170 MB) from {CIFAR10.url} to {folder}")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        CIFAR10(folder, download=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise _Unavailable(
            f"data.root: no CIFAR-10 in {folder} and downloading it failed ({error})",
            "put cifar10.zip or cifar-10-batches-py there, or set data.name=digits",
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


# --- digits -----------------------------------------------------------------------------------


def _load_digits(name: str, root: str) -> Dataset:
    """Load scikit-learn's 1437 + 360 handwritten digits of 8x8 (Alpaydin & Kaynak 1998)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # The split is fixed: sorted by class, every fifth picture is for testing, so that each class
    # has the same share of test pictures.
    order = np.argsort(digits.target, kind="stable")
    is_test = np.arange(len(order)) % 5 == 0
    order = np.concatenate([order[~is_test], order[is_test]])
    levels = np.rint(digits.images[order] * (255 / 16)).astype(np.uint8)
    images = np.repeat(levels[..., None], 3, axis=3)
    names = map(str, digits.target_names)
    return Dataset.from_arrays(name, images, digits.target[order], (~is_test).sum(), names)


# --- the user's own pictures --------------------------------------------------------------------


def _load_imagefolder(name: str, root: str) -> Dataset:
    """Load the pictures in train/<class>/ and test/<class>/ of the folder or zip `root`."""
    folder = Path(os.path.expanduser(root))
    _check_root(root, folder)
    source = find_source(folder)
    if source is None:
        raise _Unavailable(
            f"data.root: no train/<class>/ and test/<class>/ in {root}",
            "put pictures there or correct data.root",
        )
    return read_layout(name, source, PICTURE_SUFFIXES)


def _load_huggingface(name: str, root: str) -> Dataset:
    """Load a Hugging Face data set, given by its name or a folder; a leading "hf:" is optional."""
    path = name.removeprefix("hf:")
    train, test = _huggingface_splits(name, path)
    images, label, class_names = _huggingface_columns(name, train.features)
    if test.features != train.features:
        raise DataError(f"data.name: {name}: its splits have different columns; use another set")
    labels = np.array([*train[label], *test[label]], dtype=float)  # a label None becomes NaN
    if not (labels >= 0).all():
        raise DataError(f"data.name: {name}: pictures without a label; use another set")
    truncated = []
    pictures = itertools.chain(
        _huggingface_pictures(f"{name}: training picture", train, images, truncated),
        _huggingface_pictures(f"{name}: test picture", test, images, truncated),
    )
    stacked = stack_pictures(pictures, len(labels))
    if truncated:
        say(f"warning: {describe_truncated(truncated)}")
    return Dataset.from_arrays(name, stacked, labels, len(train), class_names)


def _huggingface_splits(name: str, path: str):
    """Return the training split and the test split, as data sets of the library `datasets`."""
    import datasets

    is_local = Path(path).exists()
    is_saved = Path(path, "dataset_dict.json").is_file()  # written by DatasetDict.save_to_disk
    try:
        splits = datasets.load_from_disk(path) if is_saved else datasets.load_dataset(path)
    except Exception as error:  # datasets, its file formats and its HTTP client raise many kinds
        reason = f"data.name: {name} cannot be loaded ({str(error).partition(chr(10))[0]})"
        if is_local:
            raise DataError(f"{reason}; check the files in it") from error
        raise _Unavailable(reason, "check its name and the connection") from error
    for test in ("test", "validation", "valid"):
        if "train" in splits and test in splits and len(splits["train"]) and len(splits[test]):
            return splits["train"], splits[test]
    raise DataError(
        f"data.name: {name} has the splits {', '.join(splits)}; "
        "it needs train and one of test, validation, valid"
    )


def _huggingface_columns(name: str, features) -> tuple[str, str, list[str]]:
    """Choose the first column of pictures and the column of labels with the most classes.

    Returns the names of both columns, and the names of the classes.
    """
    import datasets

    images = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not images or not labels:
        raise DataError(
            f"data.name: {name} has the columns {', '.join(features)}; "
            "it needs one of type Image and one of type ClassLabel"
        )
    label = max(labels, key=lambda key: features[key].num_classes)
    return images[0], label, features[label].names


def _huggingface_pictures(
    what: str, split, column: str, truncated: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the origin and the pixels of each picture; name those that lose bits in `truncated`."""
    import datasets

    kind = split.features[column]
    rows = iter(split.select_columns(column).cast_column(column, datasets.Image(decode=False)))

    def open_picture(where: str) -> Image.Image:
        stored = next(rows)[column]  # "bytes", or the "path" of a file
        file = io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]
        with Image.open(file) as picture:
            if has_deep_colour(picture):
                truncated.append(where)
        return kind.decode_example(stored)

    for index in range(len(split)):
        where = f"{what} {index}"
        yield where, to_rgb(where, partial(open_picture, where))


# To add a data set, write a function of data.name and data.root that returns a Dataset, and name
# it here.
LOADERS = {
    "cifar10": _load_cifar10,
    "digits": _load_digits,
    "imagefolder": _load_imagefolder,
}
