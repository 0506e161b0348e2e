"""Which client trains which width of the network: as wide as its device and its link allow."""

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

    choices: the widest first, which is the whole network. choice_of: int64 [clients], the client's
    place among them; -1 for one that takes no part. num_left_out: how many clients have pictures,
    and too little memory to take part.
    """

    def __init__(self, choices: list[Width], choice_of: np.ndarray, num_left_out: int = 0):
        self.choices, self.num_left_out = choices, num_left_out
        self._choice_of = choice_of
        # Whoever takes no part would have the whole network.
        places = np.maximum(choice_of, 0)
        self.shares = np.array([width.share for width in choices])[places]  # float64 [clients]
        self.num_values = np.array([width.num_values for width in choices])[places]
        self.work = np.array([width.work for width in choices])[places]

    def share_of(self, client: int) -> float:
        """The share of the channels that the client trains."""
        return float(self.shares[client])

    @property
    def candidates(self) -> np.ndarray:
        """The clients that take part, int64, ascending."""
        return np.flatnonzero(self._choice_of >= 0)

    @property
    def one_of_each(self) -> list[int]:
        """A client of each width that somebody trains."""
        taking_part = self.candidates
        _, first = np.unique(self._choice_of[taking_part], return_index=True)
        return taking_part[first].tolist()

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
            trained = self._choice_of[self.candidates]
            numbers = np.bincount(trained, minlength=len(self.choices))
            counts = [
                f"{width.share:g} by {number}"
                for width, number in zip(self.choices, numbers, strict=True)
            ]
            lines.append(f"shares of the channels, by clients that train them: {', '.join(counts)}")
        return lines


def assign_widths(
    config: Config,
    choices: list[Width],  # the widest first
    memory_gib: np.ndarray,  # float64 [clients]: of their devices
    candidates: np.ndarray,  # int64: clients that have pictures
    seconds: Callable[[Width], np.ndarray],  # of each client's round at a width, if it is alone
) -> Widths:
    """Give each client the widest network that it is to train and that its memory holds.

    even: client i is to train width i % n. capability: the widest whose round meets the deadline;
    a client that is too slow for all of them trains the narrowest one, and is late. A client whose
    memory holds none takes no part. Raises ConfigError if nobody trains the whole network: a part
    of it would stay as it began.
    """
    choice_of, deadline = np.full(len(memory_gib), -1), config.schedule.deadline_seconds
    evenly = np.arange(len(memory_gib)) % len(choices)
    for place, width in reversed(list(enumerate(choices))):  # the widest has the last word
        holds = width.memory_gib <= memory_gib
        if config.submodel.assignment == "capability":
            suits = seconds(width) <= deadline
        else:
            suits = evenly <= place
        choice_of[holds & (suits | (choice_of < 0))] = place
    left_out = np.ones(len(memory_gib), bool)
    left_out[candidates] = False
    choice_of[left_out] = -1
    if not (choice_of == 0).any():
        raise ConfigError(_why_nobody_trains_the_whole(choices[0], memory_gib[candidates]))
    return Widths(choices, choice_of, len(candidates) - int((choice_of >= 0).sum()))


def _why_nobody_trains_the_whole(whole: Width, memory_gib: np.ndarray) -> str:
    most = memory_gib.max(initial=0.0)
    if most < whole.memory_gib:
        return (
            f"network: no device can train the network: a batch takes {whole.memory_gib:.3g} GiB "
            f"of memory, and the largest device has {most:.3g}; lower model.width or "
            f"local.batch_size"
        )
    return (
        "submodel.widths: nobody who may train the whole network has the memory and the time, so a "
        "part of it would stay as it began; lower model.width, or raise schedule.deadline_seconds"
    )
