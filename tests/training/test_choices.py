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
