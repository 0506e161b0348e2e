"""Read samples.npz: some pictures of some clients, which a run with data.diversity keeps."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from bandwidth_analysis.errors import REPAIR, AnalysisError


@dataclass(frozen=True, eq=False)
class Samples:
    """S pictures, those of a client next to each other."""

    client: np.ndarray  # int64 [S], whose picture it is
    images: np.ndarray  # uint8 [S, H, W, 3]
    labels: np.ndarray  # int64 [S], as the client labels them
    classes: np.ndarray  # int64 [S], as the server labels them


def read_samples(path: Path, num_clients: int, num_classes: int) -> Samples | None:
    """Read samples.npz; return None if there is none. Raises AnalysisError if it is damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            samples = Samples(**{field.name: arrays[field.name] for field in fields(Samples)})
    except Exception:  # numpy and zipfile raise a dozen kinds for damaged files
        raise AnalysisError(f"{path}: damaged or half-written; {REPAIR}") from None
    bounds = ((samples.client, num_clients), (samples.labels, num_classes))
    bounds += ((samples.classes, num_classes),)
    images = samples.images
    are_pictures = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
    if not (are_pictures and images.size and all(_is_row(*b, len(images)) for b in bounds)):
        raise AnalysisError(f"{path}: holds no pictures of clients of this run; {REPAIR}")
    return samples


def _is_row(values: np.ndarray, high: int, length: int) -> bool:
    """Tell whether these are `length` whole numbers from 0 to high - 1."""
    is_whole = np.issubdtype(values.dtype, np.integer) and values.shape == (length,)
    return bool(is_whole and (values >= 0).all() and (values < high).all())
