"""data/layouts.py."""

import numpy as np
import pytest
from helpers.pictures import CLASSES, corrupt, random_picture, same, write_folder, write_zip
from PIL import Image

from data import DataError, load_dataset


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
