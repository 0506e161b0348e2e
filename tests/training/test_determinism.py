"""determinism.py: what is chosen; a CPU is left alone."""

import os
import subprocess
import sys

import torch
from helpers.noise import CPU, PICTURES, flat_model
from helpers.runs import REPOSITORY

from config import Local
from training import determinism, timing
from training.determinism import choose_determinism, probe_determinism, use_deterministic_kernels


def test_deterministic_kernels_are_chosen_unless_they_cost_a_tenth():
    assert choose_determinism({"true": 1.09, "false": 1.0})
    assert choose_determinism({"true": 0.9, "false": 1.0})
    assert not choose_determinism({"true": 1.2, "false": 1.0})
    assert choose_determinism({})  # a CPU


def test_a_cpu_is_left_alone():
    before = torch.backends.cudnn.deterministic, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    use_deterministic_kernels(CPU, True)
    assert probe_determinism(flat_model(), PICTURES, Local(), "fp32", 1) == {}
    assert not torch.are_deterministic_algorithms_enabled()
    after = torch.backends.cudnn.deterministic, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    assert after == before


def test_a_gpu_is_told_and_both_ways_are_timed(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(timing, "PROBE_SECONDS", 0.0)
    model, cost = flat_model(), {True: 1.05, False: 1.0}
    model.device = torch.device("cuda")
    try:
        seconds = lambda *_: cost[torch.backends.cudnn.deterministic]  # noqa: E731
        monkeypatch.setattr(determinism, "least_seconds", seconds)
        found = probe_determinism(model, PICTURES, Local(), "fp32", 4)
        assert found == {"true": 1.05, "false": 1.0}
        use_deterministic_kernels(model.device, True)
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        use_deterministic_kernels(model.device, False)
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_cublas_is_told_before_its_start_and_a_users_own_setting_stays():
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]  # since determinism.py was imported
    code = "import os, training.determinism; print(os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    environment, command = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, [sys.executable, "-c"]
    done = subprocess.run(
        [*command, code], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == ":16:8", done.stderr
