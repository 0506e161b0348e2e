"""Pictures in train/<class>/ and test/<class>/, in a folder or a zip, decoded once and cached.

Classes are numbered in the sorted order of their folder names and pictures are taken in the
sorted order of their file names, so a folder and a zip of the same files give equal arrays.
"""

import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

from .errors import DataError

SPLITS = ("train", "test")
TENSORS = ("train_images", "train_labels", "test_images", "test_labels")


class FolderSource:
    """A folder that holds train/<class>/ and test/<class>/."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> Iterator[str]:
        """Yield "train/<class>/" of every class folder and "train/<class>/<file>" of every file."""
        for split in SPLITS:
            classes = (self.path / split).glob("*/")
            for folder in classes:
                yield f"{split}/{folder.name}/"
                yield from (f"{split}/{folder.name}/{entry.name}" for entry in os.scandir(folder))

    def open(self, name: str) -> Image.Image:
        return Image.open(self.path / name)

    def key(self) -> str:
        """A hash that changes when a file is added, removed, renamed, resized or rewritten."""
        stats = []
        for name in sorted(self.names()):
            stat = (self.path / name).stat()
            stats.append((name, stat.st_size, stat.st_mtime_ns))
        return _sha256(json.dumps([str(self.path.resolve()), stats]).encode())


class ZipSource:
    """A zip that holds train/<class>/ and test/<class>/."""

    def __init__(self, path: Path):
        self.path = path
        self._zip = None

    def names(self) -> list[str]:
        return self._directory().namelist()

    def open(self, name: str) -> Image.Image:
        return Image.open(io.BytesIO(self._directory().read(name)))

    def key(self) -> str:
        """A hash of every byte of the file: a zip altered anywhere never meets the cache."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _directory(self) -> zipfile.ZipFile:
        """Open the zip on first need: listing 60,000 names takes longer than a cached load."""
        if self._zip is None:
            try:
                self._zip = zipfile.ZipFile(self.path)
            except Exception as error:  # not BadZipFile alone where the directory is garbled
                raise DataError(
                    f"{self.path}: not a zip, or a truncated one ({error}); fetch it again"
                ) from error
        return self._zip


def find_source(root: Path) -> FolderSource | ZipSource | None:
    """Where below `root` the pictures are; None if nowhere.

    In this order: `root` is a zip; train/ or test/ in it; cifar10.zip in it; the only *.zip in it
    with that layout. Raises DataError if there are several such zips, or one that is unreadable.
    """
    if root.is_file():
        return ZipSource(root)
    if any((root / split).is_dir() for split in SPLITS):
        return FolderSource(root)
    if (root / "cifar10.zip").is_file():
        return ZipSource(root / "cifar10.zip")
    sources = [ZipSource(path) for path in sorted(root.glob("*.zip"))]
    found = [source for source in sources if _has_layout(source)]
    if len(found) > 1:
        several = ", ".join(source.path.name for source in found)
        raise DataError(f"data.root: {root} holds several data sets ({several}); name one of them")
    return found[0] if found else None


def _has_layout(source: ZipSource) -> bool:
    return {name.partition("/")[0] for name in source.names()} >= set(SPLITS)


def read_layout(source: FolderSource | ZipSource, suffixes: set[str]) -> dict:
    """Every picture of `source` whose suffix is in `suffixes`, as the fields of a Dataset.

    Raises DataError naming the file for an unreadable picture or one of another size, and naming
    the folder for a class without pictures or that is in one split only.
    """
    folder = _cache_folder(source.key() + " ".join(sorted(suffixes)))
    cached = _read_cache(folder)
    if cached is not None:
        return cached
    files, labels, class_names, num_train = _list_pictures(source, suffixes)
    images = stack_pictures(_decode(source, files), len(files))
    fields = as_fields(images, labels, num_train, class_names)
    _write_cache(folder, fields)
    return fields


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


def as_fields(
    images: np.ndarray, labels: np.ndarray, num_train: int, class_names: Iterable[str]
) -> dict:
    """The fields of a Dataset but for its name; the first `num_train` pictures are for training.

    images: uint8 [N + M, H, W, 3]; labels: integers [N + M].
    """
    images, labels = np.ascontiguousarray(images), np.asarray(labels, np.int64)
    arrays = (images[:num_train], labels[:num_train], images[num_train:], labels[num_train:])
    fields = dict(zip(TENSORS, map(torch.from_numpy, arrays), strict=True))
    fields["class_names"] = tuple(class_names)
    fields["fingerprint"] = _fingerprint(fields)
    return fields


def _fingerprint(fields: dict) -> str:
    """sha256 over names, shapes and values: equal if and only if the data are."""
    shapes = [list(fields[name].shape) for name in TENSORS]
    digest = hashlib.sha256(json.dumps([shapes, fields["class_names"]]).encode())
    for name in TENSORS:
        digest.update(fields[name].numpy())
    return digest.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# The cache: one folder a set, named by its content. It is never needed and never trusted: what it
# holds must have the fingerprint that was written with it, or the pictures are decoded again.


def _cache_folder(content: str) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "federated-bytes" / _sha256(content.encode())[:32]


def _read_cache(folder: Path) -> dict | None:
    try:
        fields = json.loads((folder / "meta.json").read_text())
        fields["class_names"] = tuple(fields["class_names"])
        for name in TENSORS:
            fields[name] = torch.from_numpy(np.load(folder / f"{name}.npy", allow_pickle=False))
        return fields if fields["fingerprint"] == _fingerprint(fields) else None
    except Exception:  # absent, or damaged in whatever way
        return None


def _write_cache(folder: Path, fields: dict) -> None:
    """Write under a temporary name, then rename: another process sees all of it or nothing."""
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=folder.parent)
        for name in TENSORS:
            np.save(Path(temporary, f"{name}.npy"), fields[name].numpy())
        meta = {name: fields[name] for name in ("class_names", "fingerprint")}
        Path(temporary, "meta.json").write_text(json.dumps(meta))
        shutil.rmtree(folder, ignore_errors=True)  # what is there by now is damaged
        os.rename(temporary, folder)
    except OSError as error:
        if _read_cache(folder) is None:  # else another process was faster
            print(f"warning: decoded pictures not cached in {folder}: {error}", file=sys.stderr)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
