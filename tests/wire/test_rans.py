"""wire/rans.py: round trips, what a symbol costs, and bounds that never meet."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from wire.rans import (
    ESCAPE,
    code_small_number,
    code_symbol,
    first_words,
    is_spent,
    new_table,
    push_all,
)

START = np.uint64(0), 0
FIRST = first_words(np.arange(27).reshape(3, 9) % 9 + 1)


@njit
def code(reading, small, numbers, contexts, head, tape, table):
    for k in range(len(numbers)):
        if small:
            numbers[k], head = code_small_number(
                reading, numbers[k], contexts[k], head, tape, table
            )
        else:
            numbers[k], head = code_symbol(reading, numbers[k], contexts[k], head, tape, table)
    return head


def written(numbers: np.ndarray, contexts: np.ndarray, small: bool = False):
    """(x, words) that hold the numbers, and the table as it was then."""
    steps, table = np.empty(len(numbers), np.uint64), new_table(FIRST)
    head = code(False, small, numbers.copy(), contexts, START, steps, table)
    return *push_all(steps[: head[1]]), table


def read(x: int, words: bytes, contexts: np.ndarray, small: bool = False):
    tape, numbers = np.frombuffer(words, ">u4").astype(np.uint32), np.zeros_like(contexts)
    table = new_table(FIRST)
    head = code(True, small, numbers, contexts, (np.uint64(x), 0), tape, table)
    return numbers, is_spent(head, tape), table


def sequences(largest: int):
    return st.lists(st.tuples(st.integers(0, largest), st.integers(0, 2)), max_size=300)


@settings(max_examples=100, deadline=None)
@given(sequences(8))
def test_symbols_come_back(sequence):
    numbers, contexts = np.array(sequence, np.int64).reshape(-1, 2).T.copy()
    x, words, then = written(numbers, contexts)
    assert 1 <= x < 2**63 and (x >= 2**31 or not words)
    found, spent, now = read(x, words, contexts)
    assert spent and found.tolist() == numbers.tolist()
    assert (now[0] == then[0]).all()


@settings(max_examples=100, deadline=None)
@given(sequences(ESCAPE))
def test_small_numbers_come_back(sequence):
    numbers, contexts = np.array(sequence, np.int64).reshape(-1, 2).T.copy()
    x, words, _ = written(numbers, contexts, small=True)
    found, spent, _ = read(x, words, contexts, small=True)
    assert spent and found.tolist() == numbers.tolist()


@pytest.mark.parametrize("numbers", [[0], [8], [0, 8], [3, 4], [8, 0, 0, 0], range(9)])
def test_bounds_never_meet_whatever_comes(numbers):
    """Each symbol keeps a part, so that it can still be sent: 4,000 times the same few symbols."""
    numbers = np.tile(np.array(numbers, np.int64), 4000)
    contexts = np.zeros_like(numbers)
    _, _, (_, lanes) = written(numbers, contexts)
    bounds = lanes.reshape(-1, 16)[:, 3:13].astype(int)
    assert (bounds[:, 0] == 0).all() and (bounds[:, 9] == 32768).all()
    assert (np.diff(bounds) >= 1).all()
    everything = np.append(numbers, range(9))
    x, words, _ = written(everything, np.zeros_like(everything))
    assert read(x, words, np.zeros_like(everything))[0][-9:].tolist() == list(range(9))


def test_symbols_cost_their_entropy():
    """20,000 of one source: within 3% of its entropy, learning included."""
    rng = np.random.default_rng(0)
    chances = np.array([40, 20, 10, 10, 8, 5, 4, 2, 1]) / 100
    numbers = rng.choice(9, 20_000, p=chances)
    _, words, _ = written(numbers, np.zeros_like(numbers))
    entropy = -(chances * np.log2(chances)).sum() * len(numbers) / 8
    assert 0.98 * entropy < len(words) < 1.03 * entropy


def test_the_first_bounds_are_the_weights():
    _, lanes = new_table(first_words(np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9], [1] * 9])))
    sums = [0, 1, 3, 6, 10, 15, 21, 28, 36, 45]
    assert lanes[3:13].tolist() == [32768 * s // 45 for s in sums]
    assert lanes[19:29].tolist() == [32768 * s // 9 for s in range(10)]


def test_what_is_left_over_is_seen():
    contexts = np.zeros(40, np.int64)
    x, words, _ = written(np.arange(40) % 9, contexts)
    assert read(x, words, contexts)[1]
    assert not read(x, words + bytes(4), contexts)[1]
    assert not read(x + 1, words, contexts)[1]
    assert not read(x, words, contexts[:39])[1]
