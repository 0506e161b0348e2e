"""data/sources.py: folders and zips, wherever they were made and whatever their names are."""

import errno
import json
import os
import zipfile
from pathlib import Path

import pytest
from helpers.locales import LOCALES
from helpers.pictures import CLASSES, same, write_folder, write_zip
from helpers.runs import PYTHON, launch

from data import DataError, load_dataset


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


def test_damaged_zips_are_named_and_never_replaced(tmp_path):
    zipped = write_zip(tmp_path / "cifar10.zip", write_folder(tmp_path / "pictures"))
    content = zipped.read_bytes()
    for damaged in (b"", b"text", content[:200], content[:-30], content[:-1]):
        zipped.write_bytes(damaged)
        for root in (zipped, tmp_path):
            with pytest.raises(DataError, match="cifar10.zip: not a zip, or a truncated one"):
                load_dataset("cifar10", str(root), fallback="digits")


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(
    "file",
    [
        "train/ant/.DS_Store",
        "train/ant/._0.png",
        "train/ant/Thumbs.db",
        "test/desktop.ini",
        "train/.ipynb_checkpoints/0.png",
        "train/ant/.thumbnails/0.png",
        "train/__MACOSX/._ant.png",
    ],
)
def test_litter_is_passed_over_in_silence(tmp_path, zipped, file, capsys):
    folder = write_folder(tmp_path / "pictures")
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"anything")
    root = write_zip(tmp_path / "pictures.zip", folder) if zipped else folder
    data = load_dataset("imagefolder", str(root))
    assert data.class_names == CLASSES and len(data.train_labels) == 9
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_read_is_no_folder_without_pictures(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "pictures")
    (folder / "train" / "ant" / "more").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("more"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot be read: .*Permission denied: .*ant/more"):
        load_dataset("imagefolder", str(folder))


# --- zips of every origin -----------------------------------------------------------------------


def rename_in_zip(path: Path, folder: Path, rename) -> Path:
    """Zip `folder` under other names."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder).as_posix() + "/" * file.is_dir()
            archive.writestr(rename(name), b"" if file.is_dir() else file.read_bytes())
    return path


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"pictures/{name}",
        lambda name: f"my data/train set/{name}",
        lambda name: name.replace("/", "\\"),
        lambda name: f"pictures\\{name}".replace("/", "\\"),
        lambda name: f"./{name}",
    ],
    ids=["one folder around", "two folders around", "Windows", "Windows, one folder", "dot"],
)
def test_zips_of_every_origin_give_what_their_folder_gives(tmp_path, rename, capsys):
    folder = write_folder(tmp_path / "pictures")
    zipped = rename_in_zip(tmp_path / "pictures.zip", folder, rename)
    with zipfile.ZipFile(zipped, "a") as archive:
        archive.writestr("__MACOSX/pictures/train/ant/._0.png", b"of macOS")
        archive.writestr("README.txt", b"of the author")
    data = load_dataset("imagefolder", str(folder))
    assert same(data, load_dataset("imagefolder", str(zipped)))
    folder.rename(tmp_path / "away")
    assert same(data, load_dataset("imagefolder", str(tmp_path)))  # found beside other things
    assert capsys.readouterr().err == ""


def test_a_zip_of_several_data_sets_is_refused(tmp_path):
    folder = tmp_path / "pictures"
    for name in "ab":
        write_folder(folder / name)
    zipped = write_zip(tmp_path / "pictures.zip", folder)
    with pytest.raises(DataError, match=r"pictures.zip: holds several data sets \(a/, b/\); keep"):
        load_dataset("imagefolder", str(zipped))


# --- names that are not ASCII -------------------------------------------------------------------

NAMES = ("caf\xe9", "na\xefve", "zo\xeb")  # the letters are in Latin-1 and in code page 437


class UnflaggedName(zipfile.ZipInfo):
    """A name in an encoding that the zip does not tell."""

    encoding = "utf-8"

    def _encodeFilenameFlags(self):
        return self.filename.encode(self.encoding), 0


@pytest.mark.parametrize("encoding", ["utf-8", "cp437"])
def test_names_in_a_zip_need_no_flag(tmp_path, encoding, monkeypatch):
    folder = write_folder(tmp_path / "pictures", classes=NAMES)
    monkeypatch.setattr(UnflaggedName, "encoding", encoding)
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for file in folder.rglob("*.png"):
            name = UnflaggedName(file.relative_to(folder).as_posix())
            archive.writestr(name, file.read_bytes())
    data = load_dataset("imagefolder", str(tmp_path / "pictures.zip"))
    assert data.class_names == NAMES and same(data, load_dataset("imagefolder", str(folder)))


LOAD = """
import json, sys
from data import load_dataset
data = load_dataset("imagefolder", sys.argv[1])
print(json.dumps([data.class_names, data.train_labels.tolist(), data.fingerprint]))
"""


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b"caf\xc3\xa9", "caf\xe9"),
        (b"\xe7\x8c\xab", "\u732b"),
        (b"caf\xe9", r"caf\xe9"),  # Latin-1
        (b"\xff\xfe", r"\xff\xfe"),
        (b"\xed\xb3\xbf", r"\xed\xb3\xbf"),  # a lone surrogate, which UTF-8 forbids
    ],
)
def test_odd_bytes_in_names_of_folders_and_files_are_escaped(tmp_path, raw, name, capsys):
    folder = write_folder(tmp_path / os.fsdecode(b"place " + raw))
    for split in ("train", "test"):
        (folder / split / "bee").rename(folder / split / os.fsdecode(raw))
    (folder / "train" / "ant" / "0.png").rename(
        folder / "train" / "ant" / os.fsdecode(raw + b".png")
    )
    (folder / "train" / "cow" / os.fsdecode(raw + b".txt")).write_text("left out")
    data = load_dataset("imagefolder", str(folder))
    assert data.class_names == tuple(sorted(["ant", name, "cow"]))
    assert f"(train/cow/{name}.txt)" in capsys.readouterr().err
    name.encode("utf-8")  # fails if the name still holds half a character


@pytest.mark.parametrize("raw", [b"\xff", b"two\nlines", b"\x1b[31m"])
def test_errors_and_warnings_are_a_line_that_can_be_printed(tmp_path, raw, capsys):
    place = tmp_path / os.fsdecode(raw)
    with pytest.raises(DataError) as caught:
        load_dataset("cifar10", str(place))
    folder = write_folder(place)
    load_dataset("cifar10", str(folder))
    for said in (str(caught.value), capsys.readouterr().err.removesuffix("\n")):
        assert said.isprintable() and str(tmp_path) in said


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_a_data_set_is_the_same_in_every_locale(tmp_path, locale, monkeypatch):
    folder = write_folder(tmp_path / "caf\xe9", classes=("zo\xeb", "\u732b", os.fsdecode(b"\xff")))
    said = {}
    for where in ("UTF-8", locale):
        for key, value in LOCALES[where].items():
            monkeypatch.setenv(key, value)
        done = launch(PYTHON, "-c", LOAD, str(folder))
        assert done.returncode == 0, done.stderr
        said[where] = json.loads(done.stdout)
    assert said["UTF-8"] == said[locale]
    assert sorted(said["UTF-8"][0]) == sorted(["zo\xeb", "\u732b", r"\xff"])
