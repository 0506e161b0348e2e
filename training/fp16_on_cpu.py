"""fp16 on a CPU, rounded as a GPU rounds it: the factors are fp16, the sums fp32.

Few CPUs multiply in fp16, and torch's kernels for the others take a hundred times as long as in
fp32. A GPU's tensor cores multiply fp16 and add in fp32 (Micikevicius et al. 2018, arXiv
1710.03740, section 3.3), which a CPU does by rounding what goes into an fp32 kernel and what comes
out of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

PRODUCTS = (torch.conv2d, linear)


@contextmanager
def fp16_on_cpu() -> Iterator[None]:
    """torch.autocast for fp16, in which products sum in fp32. Gradients are rounded alike."""
    with torch.autocast("cpu", torch.float16), _Products():
        yield


class _Products(TorchFunctionMode):
    """Takes over the functions in PRODUCTS; all others are autocast's."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in PRODUCTS:
            return func(*args, **kwargs or {})
        with torch.autocast("cpu", enabled=False):
            args = [_rounded(arg) if isinstance(arg, Tensor) else arg for arg in args]
            return func(*args, **kwargs or {}).half()


def _rounded(tensor: Tensor) -> Tensor:
    """The nearest numbers of fp16, in fp32; the gradient on its way back is rounded, too."""
    return tensor.half().float()
