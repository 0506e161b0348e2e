"""The cache of decoded pictures: one folder a data set, named by the set's content.

It is never needed and never trusted: what it holds must have the fingerprint that was written with
it, or the pictures are decoded again.
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

FORMAT = 2  # to be raised when meta.json holds something else, or files are read otherwise


def cache_folder(content: str) -> Path:
    """The folder of the data set that `content`, any text, identifies."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = hashlib.sha256(f"{FORMAT} {content}".encode()).hexdigest()
    return Path(home) / "federated-bytes" / digest[:32]


def read_cache(folder: Path, name: str) -> tuple[Dataset, list[str]] | None:
    """Read the data set in `folder`, under this name, and the notes on it.

    Returns None if it is absent or damaged.
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
    except Exception:  # absent, or damaged in whatever way
        return None


def write_cache(folder: Path, dataset: Dataset, notes: list[str]) -> None:
    """Write under a temporary name, then rename: another process sees all of it or nothing."""
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=folder.parent)
        for key in TENSORS:
            np.save(Path(temporary, f"{key}.npy"), getattr(dataset, key).numpy())
        meta = {key: getattr(dataset, key) for key in ("class_names", "fingerprint")}
        meta["notes"] = notes
        Path(temporary, "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # what is there by now is damaged
        os.rename(temporary, folder)
    except OSError as error:
        if read_cache(folder, dataset.name) is None:  # else another process was faster
            say(f"warning: decoded pictures not cached in {folder}: {error}")
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
