"""The device that a benchmark runs on: its name, and waiting until it has finished."""

import platform
from pathlib import Path

import torch

CPU_FACTS = Path("/proc/cpuinfo")  # on Linux


def device_name(device: torch.device) -> str:
    """The GPU's name, or that of the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = CPU_FACTS.read_text().splitlines() if CPU_FACTS.exists() else []
    names = [line.partition(":")[2].strip() for line in facts if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def wait_for(device: torch.device) -> None:
    """A GPU computes while Python goes on; a clock may be read only when it has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
