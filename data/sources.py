"""Sources of pictures: a folder or a zip that holds train/<class>/ and test/<class>/.

Both kinds of source give the same names to the same files: a class folder is called "train/ant/",
and a file in it "train/ant/0.png" or "train/ant/more/1.png".
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
# What archivers and file managers leave behind, in lower case. Hidden files are litter as well.
LITTER = {"__macosx", "thumbs.db", "desktop.ini"}


class FolderSource:
    """A folder that holds train/<class>/ and test/<class>/."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> Iterable[str]:
        """List the folders and files below train/ and test/, without litter."""
        return self._paths

    def open(self, name: str) -> Image.Image:
        """Open the picture of this name."""
        return Image.open(self._paths[name])

    def key(self) -> str:
        """Return a hash that changes when a file is added, removed, renamed or rewritten."""
        stats = []
        for name, path in sorted(self._paths.items()):
            stat = os.stat(path)
            stats.append((name, stat.st_size, stat.st_mtime_ns))
        content = json.dumps([str(self.path.resolve()), stats])
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def _paths(self) -> dict[str, str]:
        """The path of each name. Links to folders are followed, as torchvision follows them."""
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
        """List the folders and files below train/ and test/, without litter."""
        return self._infos

    def open(self, name: str) -> Image.Image:
        """Open the picture of this name."""
        return Image.open(io.BytesIO(self._zip.read(self._infos[name])))

    def key(self) -> str:
        """Return a hash of every byte of the zip, which changes when anything in it does."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def _zip(self) -> zipfile.ZipFile:
        """The open zip. It is opened late, because a load from the cache does not need it."""
        try:
            try:  # Many programs write names in UTF-8 without setting the flag that says so.
                return zipfile.ZipFile(self.path, metadata_encoding="utf-8")
            except UnicodeDecodeError:
                return zipfile.ZipFile(self.path)
        except Exception as error:  # zipfile raises many kinds where the directory is garbled
            raise DataError(
                f"{self.path}: not a zip, or a truncated one ({error}); fetch it again"
            ) from error

    @cached_property
    def _infos(self) -> dict[str, zipfile.ZipInfo]:
        """The entry of each name in the directory of the zip."""
        infos = {_with_slashes(info.filename): info for info in self._zip.infolist()}
        infos = {name: info for name, info in infos.items() if not _is_litter(name)}
        base = _find_base(self.path, infos)
        splits = tuple(f"{base}{split}/" for split in SPLITS)
        return {
            name.removeprefix(base): info for name, info in infos.items() if name.startswith(splits)
        }


def find_source(root: Path) -> FolderSource | ZipSource | None:
    """Find the pictures at `root`; return None if there are none.

    The first of these is taken: the file `root`, which must be a zip; the folder `root`, if it
    holds train/ or test/; cifar10.zip in that folder; the only zip in it that holds train/ and
    test/. Raises DataError if there are several such zips, or if a zip cannot be read.
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
    if not isinstance(error, FileNotFoundError):  # a missing train/ or test/ is reported later
        raise error


def _as_utf8(name: str) -> str:
    """Read the bytes of a file's name as UTF-8, whatever the locale is.

    A byte that is not UTF-8 becomes the four characters \\xff, so that every name can be printed
    and stored.
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _is_litter(name: str) -> bool:
    """Tell whether the file is hidden or was left behind by a file manager or an archiver."""
    return any(part.startswith(".") or part.lower() in LITTER for part in name.split("/"))


def _with_slashes(name: str) -> str:
    """Write a name in a zip as the standard has it; some Windows programs use backslashes."""
    name = name.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return "/".join(parts) + "/" * name.endswith("/")


def _find_base(path: Path, names: Iterable[str]) -> str:
    """Find the outermost folder in a zip that holds train/ and test/; return "" or "<folder>/".

    If no folder holds both, the outermost one that holds either is returned. Raises DataError if
    there are several at the same depth.
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
