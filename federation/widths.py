"""Which client trains which width of the network: as wide as its device and its link allow."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from config import Config, ConfigError


@dataclass(frozen=True)
class Width:
    """What a network takes that has this share of the channels."""

    share: float
    num_values: int  # parameters
    memory_gib: float  # of a device that trains a batch, see training/footprint.py
    work: float  # of an example, as a multiple of a step of the whole network


class Widths:
    """The widths of a run, and that of each client.

    choices: the widest first, which is the whole network; of_client: of those that take part;
    num_left_out: how many clients have too little memory to take part.
    """

    def __init__(self, choices: list[Width], of_client: dict[int, Width], num_left_out: int = 0):
        self.choices, self.of_client = choices, of_client
        self.num_left_out = num_left_out

    def of(self, client: int) -> Width:
        """The client's width; one that takes no part would have the whole network."""
        return self.of_client.get(client, self.choices[0])

    def share_of(self, client: int) -> float:
        """The share of the channels that the client trains."""
        return self.of(client).share

    @property
    def candidates(self) -> list[int]:
        """The clients that take part, ascending."""
        return list(self.of_client)

    def describe(self) -> list[str]:
        """Lines for the user: who takes no part, and how many clients train which width."""
        lines = []
        if self.num_left_out:
            least = self.choices[-1].memory_gib
            lines.append(
                f"clients that take no part: {self.num_left_out}, because training a batch takes "
                f"{least:.3g} GiB of memory, and their devices have less"
            )
        if len(self.choices) > 1:
            trained = list(self.of_client.values())
            counts = (f"{width.share:g} by {trained.count(width)}" for width in self.choices)
            lines.append(f"shares of the channels, by clients that train them: {', '.join(counts)}")
        return lines


def assign_widths(
    config: Config,
    choices: list[Width],  # the widest first
    memory_gib: np.ndarray,  # float64 [clients]: of their devices
    candidates: list[int],
    seconds: Callable[[int, Width], float],  # of a client's round at a width, if it is alone
) -> Widths:
    """Give each client the widest network that it is to train and that its memory holds.

    even: client i is to train width i % n. capability: the widest whose round meets the deadline;
    a client that is too slow for all of them trains the narrowest one, and is late. A client whose
    memory holds none takes no part. Raises ConfigError if nobody trains the whole network: a part
    of it would stay as it began.
    """
    settings, of_client = config.submodel, {}
    deadline = config.schedule.deadline_seconds

    def suits(client: int, width: Width) -> bool:
        if settings.assignment == "capability":
            return seconds(client, width) <= deadline
        return width.share <= choices[client % len(choices)].share

    for client in candidates:
        held = [width for width in choices if width.memory_gib <= memory_gib[client]]
        if held:
            of_client[client] = next((w for w in held if suits(client, w)), held[-1])
    widest = choices[0]
    if widest not in of_client.values():
        most = max((memory_gib[client] for client in candidates), default=math.inf)
        if most < widest.memory_gib:
            raise ConfigError(
                f"network: no device can train the network: a batch takes "
                f"{widest.memory_gib:.3g} GiB of memory, and the largest device has "
                f"{most:.3g}; lower model.width or local.batch_size"
            )
        raise ConfigError(
            "submodel.widths: nobody who may train the whole network has the memory and the time, "
            "so a part of it would stay as it began; lower model.width, or raise "
            "schedule.deadline_seconds"
        )
    return Widths(choices, of_client, len(candidates) - len(of_client))
