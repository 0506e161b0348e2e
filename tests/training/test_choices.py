"""choices.py: what a run says of the way its clients train."""

import torch
from helpers.noise import PICTURES, flat_model

from config import Config, Local
from training.choices import Choices


def said(monkeypatch, local: Local, device: str) -> tuple[str, list[str]]:
    """The lanes and the lines, with nothing left to measure."""
    monkeypatch.setattr("training.choices.use_deterministic_kernels", lambda *_: None)
    config, model = Config(precision="fp32", deterministic="true", local=local), flat_model()
    model.device = torch.device(device)  # nothing is put there
    choices = Choices.of(config)
    lines = choices.measure(config, model, PICTURES, cohort=10, one_by_one=True)
    return choices.lanes, lines


def test_a_gpu_says_that_an_optimizer_is_neither_recorded_nor_in_lanes(monkeypatch):
    lanes, [line] = said(monkeypatch, Local(optimizer="AdamW"), "cuda")
    assert lanes == "1" and line.startswith("lanes: 1, without CUDA graphs") and "AdamW" in line
    assert said(monkeypatch, Local(), "cuda") == ("1", [])
    assert said(monkeypatch, Local(optimizer="AdamW"), "cpu") == ("1", [])


def test_what_lanes_change_is_measured_in_lanes(monkeypatch):
    """One by one fp32 is as fast as bf16 here, together it is not; kernels are compared last."""
    asked = []
    monkeypatch.setattr("training.choices.use_deterministic_kernels", lambda *_: None)
    monkeypatch.setattr("training.choices.computes_in_bf16", lambda _: True)

    def answers(name, seconds):
        def probe(model, pictures, local, *how):
            asked.append((name, how))
            return seconds

        monkeypatch.setattr(f"training.choices.{name}", probe)

    answers("probe_precision", {"fp32": 1.0, "bf16": 0.95})
    answers("probe_lanes", {1: 10.0, 2: 6.0, 4: 3.0, 8: 3.5})
    answers("probe_precision_in_lanes", {"fp32": 3.0, "bf16": 2.0})
    answers("probe_determinism", {"true": 2.5, "false": 2.0})
    config, model = Config(precision="auto", deterministic="auto"), flat_model()
    model.device = torch.device("cuda")  # nothing is put there
    choices = Choices.of(config)
    lines = choices.measure(config, model, PICTURES, cohort=10, one_by_one=False)
    assert choices == Choices("bf16", "false", "4")
    assert asked == [
        ("probe_precision", ()),
        ("probe_lanes", ("fp32", 10)),
        ("probe_precision_in_lanes", (4,)),
        ("probe_determinism", ("bf16", 4)),
    ]
    chosen = [line.partition(" (")[0] for line in lines]
    assert chosen == ["precision: fp32", "lanes: 4", "precision: bf16", "deterministic: false"]
