"""`precision: auto`: whether this device trains faster in bf16 than in fp32."""

import torch

from config import Local
from data import Pictures
from distributed import Team
from training.flat_model import FlatModel
from training.graph_engine import make_engine
from training.memory import memory_governed_by
from training.timing import CLEARLY_FASTER, least_seconds, seconds_of_a_step, take_turns

CLEARLY_SLOWER = 3.0  # if bf16 takes more than this many times, no whole batch is tried in it
SMALL_SHARE = 16  # the first tries use one sixteenth of a batch


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16. Without them it is emulated, many times slower.

    An older torch cannot tell for a CPU; then the CPU counts as one that has them.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not hasattr(torch.cpu, "get_capabilities"):
        return True
    capabilities = torch.cpu.get_capabilities()
    names = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16")  # the last one is ARM's
    return any(capabilities.get(name) for name in names)


@memory_governed_by("local.batch_size")
def probe_precision(model: FlatModel, pictures: Pictures, local: Local) -> dict[str, float]:
    """Seconds of one training step in fp32 and, if it may be faster, in bf16.

    A CPU first tries both on a small part of a batch, so that one on which bf16 is much slower
    loses no more than a few steps of fp32. Then whole batches are timed in turn, for about two
    seconds. The probe trains the model; load its vectors again afterwards. Raises ConfigError if
    the memory does not suffice.
    """
    if model.device.type == "cuda":  # fast, and with memory for the graphs of one at a time
        return probe_precision_in_lanes(model, pictures, local, 1)
    whole = min(local.batch_size, pictures.num_train)
    small = min(whole, max(2, whole // SMALL_SHARE))
    engines = {"fp32": make_engine(model, local, "fp32", Team())}
    if computes_in_bf16(model.device):
        engines["bf16"] = make_engine(model, local, "bf16", Team())

    def seconds(precision: str, num_examples: int) -> float:
        return seconds_of_a_step(engines[precision], pictures, num_examples)

    if "bf16" in engines:
        tried = {name: min(seconds(name, small) for _ in range(2)) for name in engines}
        if tried["bf16"] > CLEARLY_SLOWER * tried["fp32"]:
            del engines["bf16"]
    return take_turns({name: lambda n=name: seconds(n, whole) for name in engines})


@memory_governed_by("local.batch_size")
def probe_precision_in_lanes(
    model: FlatModel, pictures: Pictures, local: Local, num_lanes: int
) -> dict[str, float]:
    """The same for a step of num_lanes clients at once, one precision after the other."""
    names = ("fp32", "bf16") if computes_in_bf16(model.device) else ("fp32",)
    return {name: least_seconds(model, pictures, local, name, num_lanes) for name in names}


def choose_precision(seconds: dict[str, float]) -> str:
    """bf16 if a step in it takes clearly less time; seconds: as probe_precision() returns them."""
    faster = "bf16" in seconds and seconds["bf16"] < CLEARLY_FASTER * seconds["fp32"]
    return "bf16" if faster else "fp32"
