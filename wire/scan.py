"""The order of the walk through a network: by tensor, row, column, and position in a kernel.

The walk (walk.py) sees a tensor as a grid of rows and columns, in whose cells lie kernels. Most
functions below take the whole layout so described: tensors, int64 [num_tensors, 7], a Grid each.
"""

from functools import lru_cache

import numpy as np
from xxhash import xxh3_128_digest

from layout import Layout
from wire.walk import Grid


@lru_cache(maxsize=16)
def as_grids(layout: Layout) -> np.ndarray:
    """The layout as grids, int64 [num_tensors, 7]."""
    return np.array(
        [
            Grid(offset, *_grid(shape, int(size)))
            for offset, shape, size in zip(
                layout.offsets[:-1], layout.shapes, layout.sizes, strict=True
            )
        ],
        np.int64,
    ).reshape(-1, 7)


def _grid(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """All of a Grid but the offset. A matrix [outputs, inputs] has a row for each input."""
    if len(shape) < 2:
        return 1, size, 1, 1, size, 1
    if len(shape) == 2:
        return shape[1], shape[0], 1, 1, 1, shape[1]
    kernel = int(np.prod(shape[2:]))
    if kernel == 0:  # no columns, so that nobody can place a level in one
        return shape[0], 0, 0, 1, 0, 0
    return shape[0], shape[1], kernel, shape[-1], shape[1] * kernel, kernel


def by_columns(tensors: np.ndarray) -> np.ndarray:
    """bool [num_tensors]: whether the walk meets the entries in another order than the vector's."""
    return (tensors[:, 5] < tensors[:, 6]) & (tensors[:, 1] > 1)


@lru_cache(maxsize=16)
def out_of_order(layout: Layout) -> list[int]:
    """The tensors that the walk goes through by columns, and those that could be a copy of one."""
    tensors = as_grids(layout)
    grids = set(map(tuple, tensors[by_columns(tensors), 1:4].tolist()))
    return [t for t, grid in enumerate(tensors[:, 1:4].tolist()) if tuple(grid) in grids]


def new_scratch(tensors: np.ndarray) -> tuple[np.ndarray, ...]:
    """The last seven fields of a Walk, int64, large enough for every tensor and all zero."""
    columns = int(tensors[tensors[:, 1] > 1, 2].max(initial=1))
    kernel = int(tensors[:, 3].max(initial=1))
    width = int(tensors[:, 4].max(initial=1))
    framed = int(
        (tensors[:, 3] + tensors[:, 3] // tensors[:, 4] + tensors[:, 4] + 1).max(initial=4)
    )
    sizes = len(tensors) + 1, columns, columns, framed, kernel, kernel + 3, width
    return tuple(np.zeros(size, np.int64) for size in sizes)


def scan_order(tensors: np.ndarray, indices: np.ndarray, levels: np.ndarray):
    """Sort indices and levels, in place, as the walk meets them. Returns (indices, levels, copies).

    copies: int64 [num_tensors]. copies[t] is 0 if no earlier tensor of the same grid equals tensor
    t. Otherwise the latest equal one is the copies[t]-th before it, if only tensors of this grid
    that hold something are counted. (Shortcuts and the layers beside them get equal biases.)
    """
    bounds = [*np.searchsorted(indices, tensors[:, 0]).tolist(), len(indices)]
    columns_first = by_columns(tensors)
    copies = np.zeros(len(tensors), np.int64)
    num_alike, last_equal = {}, {}
    for t, (offset, rows, columns, kernel, _, _, stride) in enumerate(tensors.tolist()):
        part = slice(bounds[t], bounds[t + 1])
        if part.start == part.stop:
            continue
        if columns_first[t]:
            inside = indices[part] - offset
            order = np.argsort(inside % stride * columns + inside // stride)
            indices[part], levels[part] = indices[part][order], levels[part][order]
        shape = rows, columns, kernel
        rank = num_alike[shape] = num_alike.get(shape, 0) + 1
        places = xxh3_128_digest(indices[part] - offset)
        content = shape, places, xxh3_128_digest(levels[part])
        copies[t] = rank - last_equal.get(content, rank)
        last_equal[content] = rank
    return indices, levels, copies
