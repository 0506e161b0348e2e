"""Where each tensor lies in a flat vector: both ends of the wire know the same layout."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors that lie one after the other in a flat vector.

    agreed: what else both ends must have agreed on; empty but for the layouts that on() makes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    agreed: bytes = b""

    @cached_property
    def sizes(self) -> np.ndarray:  # int64 [num_tensors]
        return np.array([int(np.prod(shape)) for shape in self.shapes], np.int64)

    @cached_property
    def offsets(self) -> np.ndarray:  # int64 [num_tensors + 1]
        return np.concatenate(([0], np.cumsum(self.sizes))).astype(np.int64)

    @property
    def size(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def fingerprint(self) -> int:
        """64 bits by which both ends know that they mean the same vector."""
        tensors = zip(self.names, self.shapes, strict=True)
        text = ";".join(f"{_escaped(name)}:{','.join(map(str, shape))}" for name, shape in tensors)
        return int.from_bytes(_digest(self.agreed + text.encode()), "little")

    def on(self, positions: np.ndarray) -> "Layout":
        """The layout of the entries at `positions`, which both ends know: a shared mask.

        positions: integers [n], ascending. What is left of each tensor has the shape (count,).
        Ends that disagree about the mask have different fingerprints.
        """
        positions = np.ascontiguousarray(positions, "<u8")
        counts = np.diff(np.searchsorted(positions, self.offsets.astype(np.uint64))).tolist()
        agreed = _digest(self.fingerprint.to_bytes(8, "little") + positions.tobytes())
        return Layout(self.names, tuple((count,) for count in counts), agreed)

    def where(self, chosen: np.ndarray) -> "Layout":
        """The layout of the chosen tensors alone; chosen: bool [num_tensors]."""
        tensors = [
            tensor
            for tensor, stays in zip(zip(self.names, self.shapes, strict=True), chosen, strict=True)
            if stays
        ]
        names, shapes = zip(*tensors, strict=True) if tensors else ((), ())
        return Layout(names, shapes, self.agreed)


def _escaped(name: str) -> str:
    """The name with a backslash before what separates names and shapes, so that none collide."""
    return name.replace("\\", "\\\\").replace(";", "\\;").replace(":", "\\:")


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()
