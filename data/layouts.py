"""Pictures in train/<class>/ and test/<class>/, in a folder or a zip, decoded once and cached.

Classes are numbered in the sorted order of their folder names and pictures are taken in the
sorted order of their file names, so a folder and a zip of the same files give equal arrays.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from .cache import cache_folder, read_cache, write_cache
from .dataset import Dataset
from .errors import DataError
from .sources import SPLITS, FolderSource, ZipSource


def read_layout(name: str, source: FolderSource | ZipSource, suffixes: set[str]) -> Dataset:
    """Load every picture of `source` whose suffix is in `suffixes`, as a data set of this name.

    Raises DataError naming the file for an unreadable picture or one of another size, and naming
    the folder for a class without pictures or that is in one split only.
    """
    folder = cache_folder(source.key() + " ".join(sorted(suffixes)))
    cached = read_cache(folder, name)
    if cached is not None:
        return cached
    files, labels, class_names, num_train = _list_pictures(source, suffixes)
    images = stack_pictures(_decode(source, files), len(files))
    dataset = Dataset.from_arrays(name, images, labels, num_train, class_names)
    write_cache(folder, dataset)
    return dataset


def _list_pictures(
    source: FolderSource | ZipSource, suffixes: set[str]
) -> tuple[list[str], np.ndarray, list[str], int]:
    """Files (those of train first), their labels, the names of the classes, how many are train."""
    splits = {split: {} for split in SPLITS}  # split -> class -> files
    for name in source.names():
        if name.count("/") != 2:
            continue
        split, kind, file = name.split("/")
        if split not in splits or not kind or kind.startswith("."):
            continue
        files = splits[split].setdefault(kind, [])
        # Names with a leading dot are what file managers leave behind, not pictures.
        if PurePosixPath(file).suffix.lower() in suffixes and not file.startswith("."):
            files.append(name)
    _check_classes(source.path, splits)

    class_names = sorted(splits["train"])
    ordered = [sorted(splits[split][kind]) for split in SPLITS for kind in class_names]
    labels = np.repeat(list(range(len(class_names))) * 2, [len(files) for files in ordered])
    num_train = sum(map(len, splits["train"].values()))
    return sum(ordered, []), labels, class_names, num_train


def _check_classes(path: Path, splits: dict[str, dict[str, list[str]]]) -> None:
    for split, classes in splits.items():
        if not classes:
            raise DataError(f"{path}: no pictures in {split}/<class>/; put them there")
        for kind, files in classes.items():
            if not files:
                raise DataError(f"{path}: no pictures in {split}/{kind}/; fill or remove it")
    for kind in sorted(splits["train"].keys() ^ splits["test"].keys()):
        here, there = SPLITS if kind in splits["train"] else reversed(SPLITS)
        raise DataError(
            f"{path}: class {kind!r} is in {here}/ but not in {there}/; both need the same classes"
        )


def _decode(source: FolderSource | ZipSource, files: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    # One thread: more of them only wait for each other's interpreter lock on pictures this small.
    for name in files:
        where = f"{source.path}: {name}"
        yield where, to_rgb(where, partial(source.open, name))


def to_rgb(where: str, open_picture: Callable[[], Image.Image]) -> np.ndarray:
    """The picture as uint8 [H, W, 3]; grey levels are repeated to three channels.

    Raises DataError naming `where` if it cannot be opened or decoded.
    """
    try:
        with open_picture() as picture:
            if picture.mode[0] in "IF":  # PIL would clip 16-bit levels to 255 without a word
                raise ValueError("more than 8 bits a channel")
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # PIL and zipfile raise a dozen kinds for damaged files
        raise DataError(f"{where}: unreadable picture ({error}); replace it") from error


def stack_pictures(pictures: Iterable[tuple[str, np.ndarray]], count: int) -> np.ndarray:
    """Stack `count` pictures, given with the place each is from, as uint8 [count, H, W, 3].

    Raises DataError if they are not all of one size.
    """
    images = None
    for index, (where, picture) in enumerate(pictures):
        if images is None:
            images, first = np.empty((count, *picture.shape), np.uint8), where
        if picture.shape != images.shape[1:]:
            (height, width, _), (first_height, first_width, _) = picture.shape, images.shape[1:]
            raise DataError(
                f"{where} is {width}x{height} but {first} is {first_width}x{first_height}; "
                "resize the pictures to one size"
            )
        images[index] = picture
    return images
