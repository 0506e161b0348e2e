"""How long steps take: for the settings that are `auto`, which a run measures once in its life."""

from collections.abc import Callable
from time import perf_counter
from typing import TypeVar

import torch

from config import Local
from data import Pictures
from training.engines import Engine
from training.local_sgd import train_client

PROBE_SECONDS = 2.0
CLEARLY_FASTER = 0.85  # what is chosen must take less than this share of the time: probes are noisy
NO_STEP = 1e-9  # a learning rate
Choice = TypeVar("Choice")


def seconds_of_a_step(engine: Engine, pictures: Pictures, num_examples: int) -> float:
    """Train one batch of that size."""
    indices = torch.arange(num_examples, device=engine.model.device)
    one_step = Local(steps=1, batch_size=num_examples)
    begin = perf_counter()
    loss, _ = train_client(engine, pictures, indices, one_step, NO_STEP, seed=0)
    float(loss)  # waits for the device
    return perf_counter() - begin


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
