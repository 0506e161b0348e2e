"""Where pictures lie: a folder or a zip that holds train/<class>/ and test/<class>/.

Both kinds of source list the same names for the same files: "train/ant/" for a class folder,
"train/ant/0.png" or "train/ant/more/1.png" for a file in it.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from PIL import Image

from .errors import DataError

SPLITS = ("train", "test")
LITTER = {"__macosx", "thumbs.db", "desktop.ini"}  # in lower case; hidden files are litter too


class FolderSource:
    """A folder that holds train/<class>/ and test/<class>/."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> Iterable[str]:
        return self._paths

    def open(self, name: str) -> Image.Image:
        return Image.open(self._paths[name])

    def key(self) -> str:
        """A hash that changes when a file is added, removed, renamed, resized or rewritten."""
        stats = []
        for name, path in sorted(self._paths.items()):
            stat = os.stat(path)
            stats.append((name, stat.st_size, stat.st_mtime_ns))
        content = json.dumps([str(self.path.resolve()), stats])
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def _paths(self) -> dict[str, str]:
        """The path of every name. Links to folders are followed, as torchvision does."""
        paths = {}
        for split in SPLITS:
            walk = os.walk(self.path / split, onerror=_refuse_unreadable, followlinks=True)
            for folder, folders, files in walk:
                prefix = Path(folder).relative_to(self.path).as_posix()
                for entry in (*(f"{name}/" for name in folders), *files):
                    paths[_as_utf8(f"{prefix}/{entry}")] = os.path.join(folder, entry)
        return {name: path for name, path in paths.items() if not _is_litter(name)}


class ZipSource:
    """A zip that holds train/<class>/ and test/<class>/, or one folder that holds both."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> Iterable[str]:
        return self._infos

    def open(self, name: str) -> Image.Image:
        return Image.open(io.BytesIO(self._zip.read(self._infos[name])))

    def key(self) -> str:
        """A hash of every byte of the file: a zip altered anywhere never meets the cache."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def _zip(self) -> zipfile.ZipFile:
        """The zip, opened on first need: listing 60,000 names takes longer than a cached load."""
        try:
            try:  # many programs write UTF-8 without setting the flag that says so
                return zipfile.ZipFile(self.path, metadata_encoding="utf-8")
            except UnicodeDecodeError:
                return zipfile.ZipFile(self.path)
        except Exception as error:  # not BadZipFile alone where the directory is garbled
            raise DataError(
                f"{self.path}: not a zip, or a truncated one ({error}); fetch it again"
            ) from error

    @cached_property
    def _infos(self) -> dict[str, zipfile.ZipInfo]:
        """What the zip's directory says of every name."""
        infos = {_with_slashes(info.filename): info for info in self._zip.infolist()}
        infos = {name: info for name, info in infos.items() if not _is_litter(name)}
        base = _find_base(self.path, infos)
        splits = tuple(f"{base}{split}/" for split in SPLITS)
        return {
            name.removeprefix(base): info for name, info in infos.items() if name.startswith(splits)
        }


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


def _refuse_unreadable(error: OSError) -> None:
    """Stop os.walk, which would otherwise skip a folder that it cannot read."""
    if not isinstance(error, FileNotFoundError):  # that train/ or test/ is missing is said later
        raise error


def _as_utf8(name: str) -> str:
    """The name of a file whose bytes are read as UTF-8, whatever the locale that listed it.

    A byte that is not UTF-8 is written as \\xff, so that every name can be printed and stored.
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _is_litter(name: str) -> bool:
    """Whether `name` is hidden or was left behind by a file manager or an archiver."""
    return any(part.startswith(".") or part.lower() in LITTER for part in name.split("/"))


def _with_slashes(name: str) -> str:
    """The name as zips should have it; some programs for Windows write train\\ant\\0.png."""
    name = name.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return "/".join(parts) + "/" * name.endswith("/")


def _find_base(path: Path, names: Iterable[str]) -> str:
    """Find the outermost folder that holds train/ and test/; return it as "" or "<folder>/".

    Where no folder holds both, one that holds either is found. Raises DataError if there are
    several at the same depth.
    """
    bases = {split: set() for split in SPLITS}
    for name in names:
        folders = name.split("/")[:-1]
        for split in SPLITS:
            if split in folders:
                bases[split].add(tuple(folders[: folders.index(split)]))
    found = set.intersection(*bases.values()) or set.union(*bases.values()) or {()}
    depth = min(map(len, found))
    outermost = sorted("/".join([*base, ""]) for base in found if len(base) == depth)
    if len(outermost) > 1:
        several = ", ".join(outermost)
        raise DataError(f"{path}: holds several data sets ({several}); keep one of them in it")
    return outermost[0]
