"""The cache of decoded pictures, data/cache.py."""

from pathlib import Path

import numpy as np
import pytest
from helpers.pictures import corrupt, random_picture, same, write_folder, write_zip
from PIL import Image

from data import DataError, layouts, load_dataset


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
