"""`local.lanes: auto`: how many clients this device should train at once."""

import sys

import torch

from config import Local
from data import Pictures
from training.flat_model import FlatModel
from training.memory import memory_governed_by
from training.timing import CLEARLY_FASTER, least_seconds

CLEARLY_SLOWER = 1.1  # more lanes are not tried once some take this many times the best time


@memory_governed_by("local.batch_size")
def probe_lanes(
    model: FlatModel, pictures: Pictures, local: Local, precision: str, cohort: int
) -> dict[int, float]:
    """Seconds that a step of `cohort` clients takes, by the number of lanes; 1 is one by one.

    cohort: how many clients a rank trains at a time. Powers of two are tried up to it, and it
    itself, as long as more lanes do not become slower and the memory suffices, or until the device
    cannot run the network in lanes. The idle lanes of the last group count. The probe trains the
    model; load its vectors again afterwards. Raises ConfigError if the memory does not suffice for
    one client.
    """
    task = model, pictures, local, precision
    seconds = {1: cohort * least_seconds(*task, 1)}
    tried = sorted({*_powers_of_two(cohort), cohort} - {1}) if precision != "fp16" else []
    for num_lanes in tried:
        try:
            group = least_seconds(*task, num_lanes)
        except torch.OutOfMemoryError:
            break
        except RuntimeError as error:  # such as a kernel that does not exist
            reason = str(error).splitlines()[0]
            print(f"warning: {num_lanes} lanes do not run here: {reason}", file=sys.stderr)
            break
        seconds[num_lanes] = group * -(-cohort // num_lanes)
        if seconds[num_lanes] > CLEARLY_SLOWER * min(seconds.values()):
            break
    return seconds


def choose_lanes(seconds: dict[int, float]) -> int:
    """The fastest number of lanes, but 1 unless it is clearly faster than one by one."""
    fastest = min(seconds, key=seconds.__getitem__)
    return fastest if seconds[fastest] < CLEARLY_FASTER * seconds[1] else 1


def _powers_of_two(largest: int) -> list[int]:
    return [2**n for n in range(1, largest.bit_length())]
