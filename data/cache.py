"""The cache of decoded pictures: a folder for each data set, whose name is a hash of the set.

The cache is never needed and never trusted. If the pictures in it do not have the fingerprint that
was written with them, they are decoded again.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from .dataset import TENSORS, Dataset, sha256
from .errors import say

FORMAT = 2  # Raise it when meta.json changes, or when the same files give other pictures.


def cache_folder(content: str) -> Path:
    """Return the cache's folder for the data set that the text `content` identifies."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = hashlib.sha256(f"{FORMAT} {content}".encode()).hexdigest()
    return Path(home) / "federated-bytes" / digest[:32]


def read_cache(folder: Path, name: str) -> tuple[Dataset, list[str]] | None:
    """Read the data set in `folder`, which is given this name, and the notes on it.

    Returns None if the data set is absent or damaged.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        class_names = tuple(meta["class_names"])
        tensors = {
            key: torch.from_numpy(np.load(folder / f"{key}.npy", allow_pickle=False))
            for key in TENSORS
        }
        if sha256(tensors, class_names) != meta["fingerprint"]:
            return None
        dataset = Dataset(name, **tensors, class_names=class_names, fingerprint=meta["fingerprint"])
        return dataset, meta["notes"]
    except Exception:  # The files may be absent, or damaged in any way.
        return None


def write_cache(folder: Path, dataset: Dataset, notes: list[str]) -> None:
    """Write the data set and the notes on it; other processes see all of it or nothing.

    If it cannot be written, a warning says so.
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=folder.parent)
        for key in TENSORS:
            np.save(Path(temporary, f"{key}.npy"), getattr(dataset, key).numpy())
        meta = {key: getattr(dataset, key) for key in ("class_names", "fingerprint")}
        meta["notes"] = notes
        Path(temporary, "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # it could not be read, so it is damaged
        os.rename(temporary, folder)
    except OSError as error:
        if read_cache(folder, dataset.name) is None:  # otherwise another process was faster
            say(f"warning: decoded pictures not cached in {folder}: {error}")
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
