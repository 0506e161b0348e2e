"""draws.py against a textbook SplitMix64 in Python's integers, and against chance."""

from zlib import crc32

import pytest
import torch
from helpers.noise import CPU
from torch.func import vmap

from training.draws import Draws

ONES = 2**64 - 1


def mix(state: int) -> int:
    """The output of SplitMix64 at a state, as Vigna's splitmix64.c computes it."""
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & ONES
    state = (state ^ state >> 27) * 0x94D049BB133111EB & ONES
    return state ^ state >> 31


def words(seed: int, step: int, count: int, purpose: str) -> list[int]:
    first = seed + step * 0xD1342543DE82EF95 + crc32(purpose.encode()) * 0xAF251AF3B0F025B5
    return [mix(first + index * 0x9E3779B97F4A7C15 & ONES) for index in range(count)]


def test_the_oracle_is_splitmix64():
    """The first outputs for the seed 1234567, as published with the algorithm's C code."""
    states = [1234567 + n * 0x9E3779B97F4A7C15 & ONES for n in (1, 2, 3)]
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix(state) for state in states] == expected


@pytest.mark.parametrize("seed", [0, 3, 2**63 - 1, 2**63 + 5])
@pytest.mark.parametrize("step", [0, 7, 10**6])
def test_draws_are_those_of_the_oracle(seed, step):
    draws, expected = Draws.from_seed(seed, CPU).at(step), words(seed, step, 9, "mirror")
    assert [word & ONES for word in draws.words(9, "mirror").tolist()] == expected
    assert draws.below(7, 9, "mirror").tolist() == [(word >> 33) * 7 >> 31 for word in expected]
    in_order = b"".join(word.to_bytes(8, "little") for word in expected)
    assert bytes(draws.bytes(70, "mirror").tolist()) == in_order[:70]
    order = words(seed, step, 9, "order")
    signed = [word - 2**64 * (word >> 63) for word in order]
    assert draws.order(9).tolist() == sorted(range(9), key=signed.__getitem__)


def test_each_lane_draws_as_the_client_alone():
    seeds, steps, lengths = [3, 2**62, 99], torch.tensor([0, 5, 2]), torch.tensor([6, 1, 4])
    key = torch.tensor(seeds)
    together = Draws(key).at(steps)
    mapped = vmap(lambda key: Draws(key).bytes(11, "dropout 0"))(together.key)
    order = together.order(6, torch.arange(6) < lengths[:, None])
    for lane, (seed, step) in enumerate(zip(seeds, steps.tolist(), strict=True)):
        alone = Draws.from_seed(seed, CPU).at(step)
        assert torch.equal(together.below(5, 8, "crop row")[lane], alone.below(5, 8, "crop row"))
        assert torch.equal(together.bytes(11, "dropout 0")[lane], alone.bytes(11, "dropout 0"))
        assert torch.equal(mapped[lane], alone.bytes(11, "dropout 0"))
        length = int(lengths[lane])
        assert torch.equal(order[lane, :length], alone.order(length))
        assert order[lane].sort().values.tolist() == list(range(6))


def test_seeds_steps_and_purposes_are_all_told_apart():
    draws = [
        Draws.from_seed(seed, CPU).at(step).words(50, purpose)
        for seed in (0, 1, 2)
        for step in (0, 1, 2)
        for purpose in ("order", "crop row", "crop column", "mirror", "dropout 0", "dropout 1")
    ]
    assert len(torch.cat(draws).unique()) == 50 * len(draws)


def test_draws_are_uniform():
    draws, count = Draws.from_seed(5, CPU), 120_000
    for high, values in ((6, draws.below(6, count, "a")), (256, draws.bytes(count, "b"))):
        counts = torch.bincount(values, minlength=high)
        expected = count / high
        assert len(counts) == high
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_squared - (high - 1)) < 5 * (2 * (high - 1)) ** 0.5
    places = torch.stack([draws.at(step).order(4) for step in range(4_000)])
    counts = torch.bincount((places * torch.tensor([64, 16, 4, 1])).sum(1))
    counts = counts[counts > 0]
    assert len(counts) == 24 and (counts - 4000 / 24).abs().max() < 5 * (4000 / 24) ** 0.5
