"""timing.py: how often what is compared is tried."""

import pytest
from helpers.noise import PICTURES, flat_model

from config import Local
from training import timing
from training.timing import least_seconds, take_turns


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


@pytest.mark.parametrize("num_lanes", [1, 3])
def test_a_group_is_timed_several_times_and_once_with_an_idle_lane(monkeypatch, num_lanes):
    trained, train = [], timing.Lanes.train

    def train_and_count(lanes, jobs):
        trained.append(len(jobs))
        return train(lanes, jobs)

    monkeypatch.setattr(timing.Lanes, "train", train_and_count)
    local = Local(epochs=9, batch_size=8, lr=0.1, momentum=0.9, weight_decay=0.0)
    assert least_seconds(flat_model(), PICTURES, local, "fp32", num_lanes) > 0
    assert trained == ([] if num_lanes == 1 else [2, 3, 3, 3, 3, 3])
