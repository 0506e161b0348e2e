"""data/layouts.py."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torchvision
from helpers.pictures import (
    CLASSES,
    corrupt,
    png_of_16_bits,
    random_picture,
    same,
    write_folder,
    write_zip,
)
from PIL import Image

from data import DataError, datasets, load_dataset


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


# --- as torchvision does ------------------------------------------------------------------------


def bmp_of_16_bits_a_pixel() -> bytes:
    """A BMP file, 5x4, whose pixels have 5 bits of red, 6 of green and 5 of blue."""
    pixels = np.random.default_rng(0).integers(0, 65536, (4, 6)).astype("<u2").tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, 5, 4, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    return struct.pack("<2sIII", b"BM", 66 + len(pixels), 0, 66) + header + masks + pixels


def write_varied_folder(root: Path) -> Path:
    """Pictures of every kind that torchvision reads, some of them in folders of their own."""
    folder = write_folder(root)
    bee, more = folder / "train" / "bee", folder / "train" / "bee" / "more"
    (more / "still more").mkdir(parents=True)
    (folder / "train" / "bee-like").mkdir()
    (folder / "test" / "bee-like").mkdir()
    picture = Image.fromarray(random_picture(1))
    for number, suffix in enumerate(datasets.PICTURE_SUFFIXES):
        kind = "L" if suffix == ".pgm" else "RGB"
        picture.convert(kind).save(more / f"{number}{suffix}")
    picture.convert("L").save(more / "still more" / "0.JPEG")
    picture.convert("P").save(folder / "train" / "bee-like" / "a.PNG")
    picture.convert("LA").save(folder / "test" / "bee-like" / "b.png")
    picture.convert("CMYK").save(bee / "c.Jpg")
    (bee / "bits.pgm").write_text("P1 5 4\n" + "0 1 " * 10)
    (bee / "d.bmp").write_bytes(bmp_of_16_bits_a_pixel())
    return folder


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_pictures_are_those_of_torchvisions_imagefolder(tmp_path, zipped, capsys):
    folder = write_varied_folder(tmp_path / "pictures")
    root = write_zip(tmp_path / "pictures.zip", folder) if zipped else folder
    data = load_dataset("imagefolder", str(root))
    for split in ("train", "test"):
        theirs = torchvision.datasets.ImageFolder(folder / split)
        assert data.class_names == tuple(theirs.classes)
        assert getattr(data, f"{split}_labels").tolist() == theirs.targets
        pixels = np.stack([np.asarray(picture) for picture, _ in theirs])
        assert np.array_equal(getattr(data, f"{split}_images"), pixels)
    assert len(data.train_labels) == 9 + 14 and capsys.readouterr().err == ""


def test_the_suffixes_are_torchvisions():
    assert datasets.PICTURE_SUFFIXES == torchvision.datasets.folder.IMG_EXTENSIONS


# --- what is left out ---------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("imagefolder", "train/9.png", "1 (train/9.png), because only .jpg, .jpeg, .png,"),
        (
            "imagefolder",
            "train/ant/9.gif test/bee/x/9.npy",
            "2 (test/bee/x/9.npy, train/ant/9.gif)",
        ),
        (
            "imagefolder",
            "test/ant/a.txt test/ant/b test/c test/d.png",
            "4 (test/ant/a.txt, test/ant",
        ),
        ("cifar10", "train/ant/9.jpg", "1 (train/ant/9.jpg), because only .png in train/<class>/"),
    ],
)
def test_what_is_left_out_is_counted_and_named(tmp_path, zipped, name, files, message, capsys):
    folder = write_folder(tmp_path / "pictures")
    for file in files.split():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"anything")
    root = write_zip(tmp_path / "pictures.zip", folder) if zipped else folder
    for _ in ("decoded", "from the cache"):
        assert len(load_dataset(name, str(root)).train_labels) == 9
        warnings = capsys.readouterr().err.splitlines()
        assert f"warning: {root}: files left out: {message}" in warnings[0]
        assert not any("left out" in warning for warning in warnings[1:])


def tiff_of_16_bits(levels: np.ndarray) -> bytes:
    """An uncompressed little-endian TIFF file of levels from 0 to 65,535, [H, W, 3]."""
    height, width, _ = levels.shape
    pixels = levels.astype("<u2").tobytes()
    bits_at = 8 + len(pixels)
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, bits_at), (259, 3, 1, 1)]
    entries += [(262, 3, 1, 2), (273, 4, 1, 8), (277, 3, 1, 3), (278, 3, 1, height)]
    entries += [(279, 4, 1, len(pixels))]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return (
        struct.pack("<2sHI", b"II", 42, bits_at + 6)
        + pixels
        + struct.pack("<3H", 16, 16, 16)
        + directory
    )


@pytest.mark.parametrize(
    ("suffix", "channels", "encode"),
    [
        (".png", 3, png_of_16_bits),
        (".png", 4, png_of_16_bits),
        (".tif", 3, tiff_of_16_bits),
        (".ppm", 3, lambda levels: b"P6 5 4 65535\n" + levels.astype(">u2").tobytes()),
    ],
)
def test_colours_of_16_bits_are_read_as_torchvision_does_and_counted(
    tmp_path, suffix, channels, encode, capsys
):
    folder = write_folder(tmp_path / "pictures")
    levels = np.random.default_rng(0).integers(0, 65536, (2, 4, 5, channels))
    for number in (0, 1):
        file = folder / "train" / "ant" / f"deep{number}{suffix}"
        file.write_bytes(encode(levels[number]))
    for _ in ("decoded", "from the cache"):
        data = load_dataset("imagefolder", str(folder))
        said = capsys.readouterr().err
        assert "pictures of more than 8 bits a channel: 2 (train/ant/deep0" in said
        assert said.count("\n") == 1
    theirs = [picture for picture, _ in torchvision.datasets.ImageFolder(folder / "train")]
    assert np.array_equal(data.train_images, np.stack([np.asarray(t) for t in theirs]))
    error = np.abs(data.train_images[3:5].numpy() - levels[..., :3] / 257)
    assert error.max() <= 1  # the upper 8 bits, of which no library keeps more


# --- damage -------------------------------------------------------------------------------------


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
