"""Random numbers without a state: each one is a hash of seed, step, purpose and index.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (SC'11). The hash is SplitMix64
(Steele et al. 2014, "Fast splittable pseudorandom number generators"). It consists of elementwise
operations on tensors, so that a draw is the same on every device, and works within vmap and CUDA
graphs, where torch's generators would give each client the same numbers or cannot be used at all.
"""

from zlib import crc32

import torch
from torch import Tensor


def _signed(number: int) -> int:
    """The number modulo 2^64, as an int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63


GAMMA = _signed(0x9E3779B97F4A7C15)  # SplitMix64's distance between two states
FIRST, SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
# Odd numbers without a relation to GAMMA, so that no step or purpose sees the states of another.
STEP, PURPOSE = _signed(0xD1342543DE82EF95), _signed(0xAF251AF3B0F025B5)
LARGEST = 2**63 - 1


class Draws:
    """What a client draws in a step, or what L clients draw in a step that they take together.

    key: int64 [] or [L]. What is drawn has the shape [count] or [L, count]; each row depends on its
    own key alone, and an entry does not depend on the count. The same call gives the same numbers:
    different draws of a step name different purposes.
    """

    def __init__(self, key: Tensor):
        self.key = key

    @classmethod
    def from_seed(cls, seed: int, device: torch.device) -> "Draws":
        # torch.full() needs no copy from the host to the device.
        return cls(torch.full((), _signed(seed), dtype=torch.int64, device=device))

    def at(self, step: int | Tensor) -> "Draws":
        """The draws of another step, counted from this one; a tensor, [] or [L], counts each row's.

        An epoch's order is drawn at the epoch's number.
        """
        return Draws(self.key + (step * STEP if isinstance(step, Tensor) else _signed(step * STEP)))

    def words(self, count: int, purpose: str) -> Tensor:
        """int64 [..., count], all of whose 64 bits are random."""
        first = self.key.unsqueeze(-1) + _signed(crc32(purpose.encode()) * PURPOSE)
        return _mix(first + torch.arange(count, device=self.key.device).mul_(GAMMA))

    def below(self, high: int, count: int, purpose: str) -> Tensor:
        """int64 [..., count] from 0 to high - 1; high is at most 2^31."""
        return _shift(self.words(count, purpose), 33).mul_(high).bitwise_right_shift_(31)

    def bytes(self, count: int, purpose: str) -> Tensor:
        """uint8 [..., count]; one word gives eight."""
        return self.words(-(-count // 8), purpose).view(torch.uint8)[..., :count]

    def order(self, count: int, is_present: Tensor | None = None) -> Tensor:
        """A random order of count examples, int64 [..., count].

        is_present: bool [..., count], true for the first examples of each row; the others stand at
        the end of its order. A row's order is that of a client which has only those examples.
        """
        words = self.words(count, "order")
        if is_present is not None:
            words.masked_fill_(~is_present, LARGEST)
        return words.argsort(dim=-1, stable=True)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place: int64 -> int64."""
    x = x.bitwise_xor_(_shift(x, 30)).mul_(FIRST)
    x = x.bitwise_xor_(_shift(x, 27)).mul_(SECOND)
    return x.bitwise_xor_(_shift(x, 31))


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros from the left, a new tensor; torch's own shift repeats the sign."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)
