"""Where pictures lie: a folder or a zip that holds train/<class>/ and test/<class>/."""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from .errors import DataError

SPLITS = ("train", "test")


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
        return hashlib.sha256(json.dumps([str(self.path.resolve()), stats]).encode()).hexdigest()


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
