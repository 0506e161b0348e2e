"""Load the pictures in train/<class>/ and test/<class>/ of a folder or a zip.

Pictures are found and ordered as torchvision's ImageFolder finds and orders them. Classes are
numbered in the sorted order of their names. The pictures of a class lie in its folder and in the
folders below it, and are taken in the sorted order of folder and file name. So a folder and a zip
of the same files give equal arrays.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from .cache import cache_folder, read_cache, write_cache
from .dataset import Dataset
from .errors import DataError, say
from .sources import SPLITS, FolderSource, ZipSource


def read_layout(name: str, source: FolderSource | ZipSource, suffixes: tuple[str, ...]) -> Dataset:
    """Load every picture of `source` that has one of the `suffixes`, as a data set of this name.

    The pictures are decoded once and then read from the cache. Warnings on stderr count and name
    the files that are left out and the pictures that lose precision.

    Raises DataError if a picture cannot be read or has another size than the first, and if a
    class has no pictures or is in one split only. The message names the file or the folder.
    """
    folder = cache_folder(source.key() + " ".join(suffixes))
    dataset, notes = read_cache(folder, name) or (None, [])
    if dataset is None:
        dataset, notes = _decode_layout(name, source, suffixes)
        write_cache(folder, dataset, notes)
    for note in notes:
        say(f"warning: {source.path}: {note}")
    return dataset


def _decode_layout(
    name: str, source: FolderSource | ZipSource, suffixes: tuple[str, ...]
) -> tuple[Dataset, list[str]]:
    """Return the data set, and notes to the user on what could not be loaded as it is."""
    splits, left_out = _list_files(source.names(), suffixes)
    _check_classes(source.path, splits, suffixes)
    class_names = sorted(splits["train"])
    groups = [splits[split][kind] for split in SPLITS for kind in class_names]
    labels = np.repeat(list(range(len(class_names))) * 2, [len(files) for files in groups])
    num_train = sum(map(len, splits["train"].values()))
    truncated = []
    pictures = stack_pictures(_decode(source, chain(*groups), truncated), len(labels))

    notes = []
    if left_out:
        notes.append(
            f"files left out: {len(left_out)} ({_some(left_out)}), because only "
            f"{', '.join(suffixes)} in train/<class>/ and test/<class>/ are read"
        )
    if truncated:
        notes.append(describe_truncated(truncated))
    return Dataset.from_arrays(name, pictures, labels, num_train, class_names), notes


def describe_truncated(names: list[str]) -> str:
    """Say which pictures lost bits when they were decoded."""
    return (
        f"pictures of more than 8 bits a channel: {len(names)} ({_some(names)}), of "
        "which only the upper 8 are used"
    )


def _some(names: list[str]) -> str:
    """Name the first three."""
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])


def _list_files(
    names: Iterable[str], suffixes: tuple[str, ...]
) -> tuple[dict[str, dict[str, list[str]]], list[str]]:
    """Return the sorted names of the pictures by split and class, and the other files' names."""
    splits, left_out = {split: {} for split in SPLITS}, []
    for name in names:
        folder, _, file = name.rpartition("/")  # "train/ant/more/1.png" is of the class "ant"
        split, kind, *_ = f"{folder}/".split("/")
        files = splits[split].setdefault(kind, []) if kind else []
        if kind and file.lower().endswith(suffixes):
            files.append(name)
        elif file:
            left_out.append(name)
    for files in chain(*(classes.values() for classes in splits.values())):
        files.sort(key=lambda name: name.rpartition("/")[::2])
    return splits, sorted(left_out)


def _check_classes(
    path: Path, splits: dict[str, dict[str, list[str]]], suffixes: tuple[str, ...]
) -> None:
    for split, classes in splits.items():
        if not classes:
            raise DataError(f"{path}: no pictures in {split}/<class>/; put them there")
        for kind, files in classes.items():
            if not files:
                read = f"only {', '.join(suffixes)} are read"
                raise DataError(
                    f"{path}: no pictures in {split}/{kind}/ ({read}); fill or remove it"
                )
    for kind in sorted(splits["train"].keys() ^ splits["test"].keys()):
        here, there = SPLITS if kind in splits["train"] else reversed(SPLITS)
        raise DataError(
            f"{path}: class {kind!r} is in {here}/ but not in {there}/; both need the same classes"
        )


def _decode(
    source: FolderSource | ZipSource, files: Iterable[str], truncated: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the origin and the pixels of each picture; name those that lose bits in `truncated`."""

    def open_picture(name: str) -> Image.Image:
        picture = source.open(name)
        if has_deep_colour(picture):
            truncated.append(name)
        return picture

    # More threads would not help: on small pictures they wait for each other's interpreter lock.
    for name in files:
        where = f"{source.path}: {name}"
        yield where, to_rgb(where, partial(open_picture, name))


def has_deep_colour(picture: Image.Image) -> bool:
    """Tell whether the file has more than 8 bits a channel, of which PIL keeps the upper 8."""
    for codec, _, _, arguments in picture.tile:  # what PIL is about to read, and how
        is_netpbm = codec.startswith("ppm") and isinstance(arguments, tuple)
        if is_netpbm and arguments[1] > 255:  # the largest level
            return True
        if re.search(";16[BLN]", str(arguments)):  # two bytes a channel, in some byte order
            return True
    return False


def to_rgb(where: str, open_picture: Callable[[], Image.Image]) -> np.ndarray:
    """Decode a picture to uint8 [H, W, 3]; grey levels are repeated in the three channels.

    `where` says in messages which picture it is. Raises DataError if it cannot be opened or
    decoded, or has more than 8 bits of grey.
    """
    try:
        with open_picture() as picture:
            if picture.mode[0] in "IF":  # PIL would clip these levels to 255 without a word
                raise ValueError("more than 8 bits a channel")
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # PIL and zipfile raise a dozen kinds for damaged files
        raise DataError(f"{where}: unreadable picture ({error}); replace it") from error


def stack_pictures(pictures: Iterable[tuple[str, np.ndarray]], count: int) -> np.ndarray:
    """Stack `count` pictures, each given with its origin, into uint8 [count, H, W, 3].

    Raises DataError if they do not all have one size.
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
