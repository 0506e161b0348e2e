"""How long steps take: for the settings that are `auto`, which a run measures once in its life."""

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import TypeVar

import torch

from config import Local
from data import Pictures
from distributed import Team
from training.engines import Engine
from training.flat_model import FlatModel
from training.graph_engine import make_engine
from training.lanes import Job, Lanes
from training.local_sgd import train_client

PROBE_SECONDS = 2.0
FEW = 4  # steps that each client of a group takes
TRIES = 5  # of a group; the first one records graphs
CLEARLY_FASTER = 0.85  # what is chosen must take less than this share of the time: probes are noisy
NO_STEP = 1e-9  # a learning rate
Choice = TypeVar("Choice")


def seconds_of_a_step(
    engine: Engine, pictures: Pictures, num_examples: int, steps: int = 1
) -> float:
    """Train batches of that size."""
    indices = torch.arange(num_examples, device=engine.model.device)
    local = Local(steps=steps, batch_size=num_examples)
    begin = perf_counter()
    loss, _ = train_client(engine, pictures, indices, local, NO_STEP, seed=0)
    float(loss)  # waits for the device
    return (perf_counter() - begin) / steps


def least_seconds(
    model: FlatModel, pictures: Pictures, local: Local, precision: str, num_lanes: int
) -> float:
    """The least seconds of a step of num_lanes clients at once, over several groups of clients.

    Nothing that trains them is left in memory.
    """
    size = min(local.batch_size, pictures.num_train)
    if num_lanes == 1:
        engine = make_engine(model, local, precision, Team())
        return min(seconds_of_a_step(engine, pictures, size, FEW) for _ in range(TRIES))
    lanes = Lanes(model, pictures, replace(local, batch_size=size), precision, num_lanes)
    _seconds_in_lanes(lanes, size, num_lanes - 1)  # with an idle lane: its graph takes memory, too
    return min(_seconds_in_lanes(lanes, size, num_lanes) for _ in range(TRIES))


def _seconds_in_lanes(lanes: Lanes, num_examples: int, num_clients: int) -> float:
    """Train a few batches of that size in so many lanes."""
    model = lanes.model
    indices = torch.arange(num_examples, device=model.device)
    vectors = model.parameters, model.buffers
    jobs = [Job(indices, NO_STEP, lane, *vectors, steps=FEW) for lane in range(num_clients)]
    begin = perf_counter()
    float(lanes.train(jobs)[-1].loss)  # waits for the device
    return (perf_counter() - begin) / FEW


def take_turns(tries: dict[Choice, Callable[[], float]]) -> dict[Choice, float]:
    """The least seconds of each try.

    They take turns for about two seconds, so that none has the machine to itself; each is tried
    at least twice, because the first time takes longer.
    """
    times: dict[Choice, list[float]] = {name: [] for name in tries}
    begin, rounds = perf_counter(), 0
    while rounds < 2 or len(tries) > 1 and perf_counter() - begin < PROBE_SECONDS:
        for name, seconds in tries.items():
            times[name].append(seconds())
        rounds += 1
    return {name: min(seconds) for name, seconds in times.items()}
