"""lane_probe.py: how many lanes are chosen, and how little time it takes to find out."""

from dataclasses import replace

import pytest
import torch
from helpers.noise import PICTURES, flat_model

from config import Local
from training import lane_probe
from training.lane_probe import choose_lanes, probe_lanes

LOCAL = Local(epochs=9, batch_size=8, lr=0.1, momentum=0.9, weight_decay=0.0)


def test_lanes_are_chosen_where_they_are_clearly_faster():
    assert choose_lanes({1: 1.0}) == 1
    assert choose_lanes({1: 1.0, 2: 0.9, 4: 0.86}) == 1
    assert choose_lanes({1: 1.0, 2: 0.8, 4: 0.5, 8: 0.6}) == 4
    assert choose_lanes({1: 1.0, 2: 1.5}) == 1


def probe(monkeypatch, cohort: int, group_seconds, precision: str = "fp32"):
    """The probe on a device where a step takes 1 s alone and group_seconds(L) in L lanes.

    Returns what it finds and the numbers of lanes that it tries, in order.
    """
    tried = []

    def least_seconds(model, pictures, local, given, num_lanes):
        assert local == LOCAL and given == precision
        tried.extend([num_lanes] if num_lanes > 1 else [])
        return group_seconds(num_lanes) if num_lanes > 1 else 1.0

    monkeypatch.setattr(lane_probe, "least_seconds", least_seconds)
    return probe_lanes(flat_model(), PICTURES, LOCAL, precision, cohort), tried


def test_powers_of_two_and_the_cohort_are_tried_and_idle_lanes_count(monkeypatch):
    found, tried = probe(monkeypatch, 10, lambda lanes: 0.5 + 0.1 * lanes)
    assert tried == [2, 4, 8, 10]
    assert found == pytest.approx({1: 10, 2: 5 * 0.7, 4: 3 * 0.9, 8: 2 * 1.3, 10: 1.5})
    assert choose_lanes(found) == 10


def test_no_more_lanes_are_tried_once_they_are_slower(monkeypatch):
    found, tried = probe(monkeypatch, 64, lambda lanes: 1.0 * lanes**1.3)
    assert tried == [2] and choose_lanes(found) == 1
    found, tried = probe(monkeypatch, 64, lambda lanes: 1.0 if lanes <= 4 else 9.0)
    assert tried == [2, 4, 8] and choose_lanes(found) == 4


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("no such kernel")])
def test_more_lanes_than_the_device_can_run_are_not_chosen(monkeypatch, capsys, error):
    def run_out(lanes):
        if lanes == 8:
            raise error
        return 1.0

    found, _ = probe(monkeypatch, 16, run_out)
    assert list(found) == [1, 2, 4] and choose_lanes(found) == 4
    said = capsys.readouterr().err
    assert said == ("warning: 8 lanes do not run here: no such kernel\n" if str(error) else "")


@pytest.mark.parametrize(("cohort", "precision"), [(1, "fp32"), (8, "fp16")])
def test_one_client_and_fp16_have_nothing_to_try(monkeypatch, cohort, precision):
    found, tried = probe(monkeypatch, cohort, lambda lanes: 0.1, precision)
    assert tried == [] and choose_lanes(found) == 1


def test_the_probe_trains_for_real():
    found = probe_lanes(flat_model("resnet18"), PICTURES, replace(LOCAL, batch_size=64), "fp32", 2)
    assert list(found) == [1, 2] and min(found.values()) > 0
