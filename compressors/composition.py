"""What the bytes of a payload are spent on: by part of its body, and by tensor.

It reads payloads that this process has written, to report on them; nothing that travels depends on
it.
"""

from collections.abc import Iterator

import numpy as np

from compressors.coder import CODED, DENSE, SMALL_DENSE, Coder, read_positions
from layout import Layout
from wire.container import OVERHEAD, Reader, unpack
from wire.entropy import encode_integers

HEADER, SMALL, POSITIONS, VALUES = "header", "small tensors", "positions", "values"
BOTH = "positions and values"  # one entropy code, which cannot be cut in two, and its scales
BYTES_PER_VALUE = 4  # of the small tensors, which travel as float32


def composition(
    payload: memoryview, layout: Layout, coder: Coder
) -> tuple[dict[str, int], dict[str, int]]:
    """(bytes by part, bytes by tensor) of a payload that `coder` has written for the layout.

    The parts that there are add up to the payload. The bytes of a tensor are those that it would
    take as a payload of its own, without the container: its values are coded by themselves, so that
    a code that adapts to what it has met begins anew. Entropy-coded levels keep the scale of the
    whole vector. Together the tensors may take somewhat more than the payload.
    """
    selection, _, flags, body = unpack(payload, layout)
    reader, parts, limit = Reader(body), {HEADER: OVERHEAD}, 0
    if flags & SMALL_DENSE:
        limit = int(reader.take("<u4", 1)[0])
        reader.take("<f4", int(layout.sizes[layout.sizes < limit].sum()))
        parts[SMALL] = reader.position
    large = layout.sizes >= limit
    rest, begin = layout.where(large), reader.position
    if selection == CODED:
        parts[BOTH] = len(body) - begin
        coder.read_head(reader, rest)
        indices, levels = coder.read_levels(reader.rest(), rest, rest.size)
        sizes = [len(encode_integers(*part)) for part in _by_tensor(rest, indices, levels)]
    else:
        indices = read_positions(reader, selection, rest, rest.size)
        if selection != DENSE:
            parts[POSITIONS] = reader.position - begin
        parts[VALUES] = len(body) - reader.position
        values = coder.decode(reader, flags, rest, rest.size if indices is None else len(indices))
        pieces = _by_tensor(rest, indices, values)
        sizes = [len(coder.encode(some, places, one, seed=0)) for places, some, one in pieces]
    by_tensor = dict(zip(layout.names, (BYTES_PER_VALUE * layout.sizes).tolist(), strict=True))
    return parts, by_tensor | dict(zip(rest.names, sizes, strict=True))


def _by_tensor(
    layout: Layout, indices: np.ndarray | None, values: np.ndarray
) -> Iterator[tuple[np.ndarray | None, np.ndarray, Layout]]:
    """Of each tensor the positions, counted from its own beginning, the values, and its layout.

    If all values travel, there are no positions.
    """
    bounds = layout.offsets if indices is None else np.searchsorted(indices, layout.offsets)
    pieces = zip(bounds, bounds[1:], layout.offsets, layout.names, layout.shapes, strict=False)
    for start, end, offset, name, shape in pieces:
        places = None if indices is None else indices[start:end] - offset
        yield places, values[start:end], Layout((name,), (shape,))
