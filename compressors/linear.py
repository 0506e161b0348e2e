"""int2..int16: each value rounded to the nearest of 2^bits - 1 evenly spaced levels."""

import numpy as np

from compressors.coder import CODED, DENSE, Body, Words
from compressors.levels import ENOUGH_STEPS, Levels, rounded
from layout import Layout


class Linear(Levels):
    """Of a whole vector each tensor has a scale; selected values share one.

    With a scale for each tensor every selected level would be near the largest, and cost about
    two bits more. The largest value of n arrives nearly exactly and all others within half a
    step, hence d = 4 s^2 / (4 s^2 + n - 1), where s is `steps`.
    """

    words = Words("int{}", 2, 16)
    kind = 4
    contractive = True

    @property
    def keeps_norms(self) -> bool:
        return self.steps >= ENOUGH_STEPS

    @property
    def ruins_models(self) -> bool:
        return self.steps == 1

    @classmethod
    def counts(cls, layout: Layout, count: int) -> np.ndarray:
        return layout.sizes[layout.sizes > 0]

    def encode(self, values, indices, layout, seed) -> Body:
        sizes = layout.sizes if indices is None else np.array([len(values)])
        levels, scales = rounded(values, sizes, self.steps, self.steps)
        if indices is None:
            return self.packed(levels, scales[sizes > 0])
        return self.coded(indices, levels, scales, layout)

    @classmethod
    def formats(cls, selected: bool) -> set[tuple[int, int]]:
        return {(CODED, cls.coded_kind)} if selected else {(DENSE, cls.kind)}
