"""Small data sets of random pictures, in memory, in folders and in zips."""

import hashlib
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import Dataset
from data.dataset import TENSORS

CLASSES = ("ant", "bee", "cow")


def random_picture(seed: int, size=(5, 4), channels=3) -> np.ndarray:
    shape = (size[1], size[0], channels)[: 3 if channels == 3 else 2]
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_folder(root: Path, classes=CLASSES, size=(5, 4), counts=(("train", 3), ("test", 2))):
    """Pictures of random pixels in root/<split>/<class>/<number>.png."""
    for split, count in counts:
        for kind in classes:
            folder = root / split / kind
            folder.mkdir(parents=True)
            for number in range(count):
                seed = int(
                    hashlib.sha256(os.fsencode(f"{split}{kind}{number}")).hexdigest()[:8], 16
                )
                Image.fromarray(random_picture(seed, size)).save(folder / f"{number}.png")
    return root


def png_of_16_bits(levels: np.ndarray) -> bytes:
    """A PNG file of levels from 0 to 65,535, [H, W, 3] colour or [H, W, 4] with opacity."""
    height, width, channels = levels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def write_zip(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in reversed(sorted(folder.rglob("*"))):  # an order that must not matter
            archive.write(file, file.relative_to(folder))
    return path


def same(one: Dataset, two: Dataset) -> bool:
    tensors = all(torch.equal(getattr(one, key), getattr(two, key)) for key in TENSORS)
    return tensors and (one.class_names, one.fingerprint) == (two.class_names, two.fingerprint)


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def noise(num_train=40, num_test=7, height=6, width=5) -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_train + num_test, height, width, 3), dtype=np.uint8)
    labels = rng.integers(0, 4, num_train + num_test)
    return Dataset.from_arrays("noise", images, labels, num_train, "abcd")
