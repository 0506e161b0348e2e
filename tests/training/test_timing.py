"""timing.py: how often what is compared is tried."""

import pytest

from training import timing
from training.timing import take_turns


@pytest.mark.parametrize(
    ("seconds", "tries"),
    [
        ({"a": 0.3, "b": 0.2}, 4),  # in turn, until two seconds have passed
        ({"a": 5.0, "b": 9.0}, 2),  # at least twice: the first time takes longer
        ({"a": 0.1}, 2),  # nothing to compare with
    ],
)
def test_each_is_tried_in_turn(monkeypatch, seconds, tries):
    now, order = [0.0], []

    def take(name):
        order.append(name)
        now[0] += seconds[name]
        return seconds[name] + (len(order) <= len(seconds))  # the first time

    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    found = take_turns({name: lambda n=name: take(n) for name in seconds})
    assert found == seconds and order == [*seconds] * tries
