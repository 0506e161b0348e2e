"""`local.lanes: auto`: how many clients this device should train at once."""

from dataclasses import replace
from time import perf_counter

import torch

from config import Local
from data import Pictures
from distributed import Team
from training.flat_model import FlatModel
from training.graph_engine import make_engine
from training.lanes import Job, Lanes
from training.memory import memory_governed_by
from training.timing import CLEARLY_FASTER, NO_STEP, seconds_of_a_step, take_turns

CLEARLY_SLOWER = 1.1  # more lanes are not tried once some take this many times the best time


@memory_governed_by("local.batch_size")
def probe_lanes(
    model: FlatModel, pictures: Pictures, local: Local, precision: str, cohort: int
) -> dict[int, float]:
    """Seconds that a step of `cohort` clients takes, by the number of lanes; 1 is one by one.

    cohort: how many clients a rank trains in a round. Powers of two are tried up to it, and it
    itself, as long as more lanes do not become slower and the memory suffices, or until the device
    cannot run the network in lanes. The idle lanes of the last group count. The probe trains the
    model; load its vectors again afterwards. Raises ConfigError if the memory does not suffice for
    one client.
    """
    size = min(local.batch_size, pictures.num_train)
    engine = make_engine(model, local, precision, Team())
    alone = take_turns({1: lambda: seconds_of_a_step(engine, pictures, size)})[1]
    seconds, one_step = {1: alone * cohort}, replace(local, steps=1, batch_size=size)
    if precision == "fp16":
        return seconds
    for num_lanes in (*_powers_of_two(cohort), cohort):
        if num_lanes in seconds:
            continue
        try:
            lanes = Lanes(model, pictures, one_step, precision, num_lanes)
            group = take_turns({num_lanes: lambda n=lanes: _seconds_of_a_group(n, size)})
        except RuntimeError:  # torch.OutOfMemoryError, or a kernel that does not exist
            break
        seconds[num_lanes] = group[num_lanes] * -(-cohort // num_lanes)
        if seconds[num_lanes] > CLEARLY_SLOWER * min(seconds.values()):
            break
    return seconds


def choose_lanes(seconds: dict[int, float]) -> int:
    """The fastest number of lanes, but 1 unless it is clearly faster than one by one."""
    fastest = min(seconds, key=seconds.__getitem__)
    return fastest if seconds[fastest] < CLEARLY_FASTER * seconds[1] else 1


def _powers_of_two(largest: int) -> list[int]:
    return [2**n for n in range(1, largest.bit_length())]


def _seconds_of_a_group(lanes: Lanes, num_examples: int) -> float:
    """Train one batch in every lane."""
    model = lanes.model
    indices = torch.arange(num_examples, device=model.device)
    vectors = model.parameters, model.buffers
    jobs = [Job(indices, NO_STEP, lane, *vectors) for lane in range(lanes.num_lanes)]
    begin = perf_counter()
    float(lanes.train(jobs)[-1].loss)  # waits for the device
    return perf_counter() - begin
