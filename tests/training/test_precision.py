"""precision.py: which precision is chosen, and how little time it takes to find out."""

from dataclasses import replace

import pytest
import torch
from helpers.noise import CPU, PICTURES, flat_model

from config import Local
from training import precision, timing
from training.precision import choose_precision, computes_in_bf16, probe_precision

LOCAL = Local(epochs=9, batch_size=32, lr=0.1, momentum=0.0, weight_decay=0.0)


class FakeDevice:
    """A clock, and a train_client() that moves it on by so many seconds an example.

    Attribute steps: (precision, number of examples) of each step, in order.
    """

    def __init__(self, monkeypatch, has_bf16: bool = True, **seconds_per_example: float):
        self.now, self.steps, self.seconds = 0.0, [], seconds_per_example
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing, "train_client", self.train_client)
        monkeypatch.setattr(precision, "computes_in_bf16", lambda _: has_bf16)

    def train_client(self, engine, pictures, indices, local, lr, seed):
        assert local.steps == 1 and local.batch_size == len(indices)
        self.now += self.seconds[engine.precision] * len(indices)
        self.steps.append((engine.precision, len(indices)))
        return 0.0, 0


def test_bf16_is_chosen_where_it_is_clearly_faster():
    assert choose_precision({"fp32": 1.0, "bf16": 0.8}) == "bf16"
    assert choose_precision({"fp32": 1.0, "bf16": 0.9}) == "fp32"
    assert choose_precision({"fp32": 1.0, "bf16": 1.6}) == "fp32"
    assert choose_precision({"fp32": 2.0, "bf16": 1.6}) == "bf16"
    assert choose_precision({"fp32": 2.0}) == "fp32"


@pytest.mark.parametrize(("batch_size", "expected"), [(32, 32), (100, 43)])
def test_the_probe_times_whole_batches_in_turn_for_two_seconds(monkeypatch, batch_size, expected):
    device = FakeDevice(monkeypatch, fp32=0.01, bf16=0.005)
    seconds = probe_precision(flat_model(), PICTURES, replace(LOCAL, batch_size=batch_size))
    assert seconds == pytest.approx({"fp32": 0.01 * expected, "bf16": 0.005 * expected})
    whole = device.steps[4:]
    assert whole == [("fp32", expected), ("bf16", expected)] * (len(whole) // 2)
    assert 2.0 <= device.now < 2.0 + 0.015 * (expected + 2 * 2)
    assert choose_precision(seconds) == "bf16"


def test_a_cpu_without_bf16_takes_no_step_in_it(monkeypatch):
    device = FakeDevice(monkeypatch, has_bf16=False, fp32=0.05, bf16=1.0)
    assert probe_precision(flat_model(), PICTURES, LOCAL) == pytest.approx({"fp32": 1.6})
    assert device.steps == [("fp32", 32)] * 2


@pytest.mark.parametrize("ratio", [3.1, 18, 60])
def test_the_probe_takes_a_few_steps_of_the_faster_precision(monkeypatch, ratio):
    """fp32 takes 1.5 s a step; bf16 that torch emulates took 27 s."""
    fp32 = 1.5 / 32
    device = FakeDevice(monkeypatch, fp32=fp32, bf16=ratio * fp32)
    assert probe_precision(flat_model(), PICTURES, LOCAL) == pytest.approx({"fp32": 1.5})
    assert ("bf16", 32) not in device.steps
    assert device.now <= 1.5 * (2.2 + ratio / 8)


def test_slow_steps_are_timed_twice_each(monkeypatch):
    device = FakeDevice(monkeypatch, fp32=1.0, bf16=2.9)
    probe_precision(flat_model(), PICTURES, LOCAL)
    assert device.steps[4:] == [("fp32", 32), ("bf16", 32)] * 2


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_probe_trains_for_real(monkeypatch, batch_size):
    monkeypatch.setattr(timing, "PROBE_SECONDS", 0.0)
    seconds = probe_precision(flat_model(), PICTURES, replace(LOCAL, batch_size=batch_size))
    assert 0 < min(seconds.values()) and max(seconds.values()) < 10


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_f": True}, False),
        ({"architecture": "x86_64", "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
        ({"architecture": "aarch64", "bf16": True}, True),
        ({}, False),
    ],
)
def test_the_cpu_is_asked_for_its_instructions(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert computes_in_bf16(CPU) is expected


def test_a_torch_that_cannot_tell_leaves_it_to_the_probe(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert computes_in_bf16(CPU)


@pytest.mark.parametrize("answer", [True, False])
def test_emulated_bf16_on_a_gpu_does_not_count(monkeypatch, answer):
    def is_supported(including_emulation: bool = True) -> bool:
        return answer or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert computes_in_bf16(torch.device("cuda")) is answer


@pytest.mark.parametrize("has_bf16", [True, False])
def test_on_a_gpu_one_precision_is_in_memory_at_a_time(monkeypatch, has_bf16):
    tried, model = [], flat_model()
    model.device = torch.device("cuda")  # nothing is put there
    monkeypatch.setattr(precision, "computes_in_bf16", lambda _: has_bf16)
    monkeypatch.setattr(precision, "least_seconds", lambda *task: tried.append(task[3:]) or 1.0)
    found = probe_precision(model, PICTURES, LOCAL)
    assert tried == [("fp32", 1), ("bf16", 1)][: 1 + has_bf16] and len(found) == len(tried)
