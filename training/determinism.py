"""`deterministic: auto`: kernels that give equal bits twice, if they cost little on this GPU.

On a CPU torch's kernels give equal bits for an equal number of threads, and nothing changes.
"""

import os

import torch

from config import Local
from data import Pictures
from training.flat_model import FlatModel
from training.memory import memory_governed_by
from training.timing import least_seconds

# cuBLAS reads it at its start, which may be long before a run has chosen its kernels.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

LARGEST_COST = 1.1  # deterministic kernels may take this many times the others' time


def use_deterministic_kernels(device: torch.device, wanted: bool) -> None:
    """Choose among a GPU's kernels, for the whole process; before the first step on the device.

    An operation without a deterministic kernel warns: torch says so of max pooling, whose kernel
    is one for windows that do not overlap.
    """
    if device.type != "cuda":
        return
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs passes over the memory
    torch.backends.cudnn.deterministic = wanted


@memory_governed_by("local.batch_size")
def probe_determinism(
    model: FlatModel, pictures: Pictures, local: Local, precision: str, num_lanes: int
) -> dict[str, float]:
    """Seconds of one training step with deterministic kernels, "true", and with any, "false".

    A step is that of num_lanes clients at once. {} on a CPU. The probe trains the model, and
    leaves the kernels as it last tried them. Raises ConfigError if the memory does not suffice.
    """
    if model.device.type != "cuda":
        return {}
    seconds = {}
    for name in ("true", "false"):
        use_deterministic_kernels(model.device, name == "true")
        seconds[name] = least_seconds(model, pictures, local, precision, num_lanes)
    return seconds


def choose_determinism(seconds: dict[str, float]) -> bool:
    """True unless deterministic kernels cost too much."""
    return not seconds or seconds["true"] < LARGEST_COST * seconds["false"]
