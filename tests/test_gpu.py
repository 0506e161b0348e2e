"""On a CUDA device: every config runs, runs repeat bit for bit, and too little memory is answered.

`make gpu-check` runs this.
"""

import os
import subprocess
import time

import pytest
import torch
from helpers.configs import CONFIGS, small
from helpers.runs import PYTHON, REPOSITORY, launch, summary, tiny_command

from command_line import load_config
from experiment import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DEVICE = "device=cuda"
RESNET = [DEVICE, "model.name=resnet18", "model.width=0.25"]
# Two runs whose models must be equal measure nothing: each might find something else faster.
FIXED = [*RESNET, "deterministic=true", "local.lanes=1"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_two_rounds(path, tmp_path, monkeypatch):
    """All that is auto is measured as in a run, but in no time."""
    monkeypatch.setattr("training.timing.PROBE_SECONDS", 0.0)
    monkeypatch.setattr("experiment.write_plots", lambda *_: [])
    words = [*small(path), "precision=auto", DEVICE, f"output_dir={tmp_path}"]
    config = load_config(path, words)
    assert main(config) == 0
    assert (config.run_folder / "summary.json").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_the_gpu(run, precision):
    status, folder = run(*RESNET, f"precision={precision}")
    assert status == 0
    result = summary(folder)
    assert 0 <= result["test_accuracy"] <= 1
    assert result["dense_bytes_up"] > 10 * result["bytes_up"]


@pytest.mark.parametrize("down", ["model", "copies"])
def test_a_pruned_model_goes_down_in_fp32(run, down):
    words = ["pruning.mask.method=dynamic", "pruning.mask.every=2", f"downlink.mode={down}"]
    status, folder = run(*RESNET, *words)
    assert status == 0 and summary(folder)["density"] < 0.9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_and_its_repetition_end_with_the_same_model(run, precision):
    hashes = []
    for name in ("one", "two"):
        status, folder = run(*FIXED, f"precision={precision}", name=name)
        assert status == 0
        hashes.append(summary(folder)["model_sha256"])
    assert hashes[0] == hashes[1]


def test_a_killed_run_that_goes_on_ends_like_one_that_was_not(tmp_path):
    settings = [*FIXED, "rounds=20", "checkpoint.every=1"]
    whole, killed = tmp_path / "whole-s1", tmp_path / "tiny-s1"
    done = launch(PYTHON, *tiny_command(tmp_path, *settings, "name=whole"))
    assert done.returncode == 0, done.stderr
    command, file = tiny_command(tmp_path, *settings), killed / "rounds.jsonl"
    with subprocess.Popen(
        [PYTHON, *command], cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        while process.poll() is None and not (file.exists() and file.read_text().count("\n") >= 3):
            time.sleep(0.01)
        process.kill()
    assert not (killed / "summary.json").exists(), "it ended before it was killed"
    done = launch(PYTHON, *command)
    assert done.returncode == 0 and "resuming" in done.stdout, done.stderr
    assert summary(killed)["model_sha256"] == summary(whole)["model_sha256"]


# 96 MiB of the GPU hold the network, but not the activations of 1400 pictures.
LITTLE_MEMORY = """
import runpy, sys, torch
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(96 * 2**20 / total)
runpy.run_path("main.py", run_name="__main__")
"""


def test_a_batch_that_does_not_fit_is_answered_in_one_line(tmp_path):
    settings = ["clients.total=1", "clients.per_round=1", "local.batch_size=1400"]
    command = tiny_command(tmp_path, *RESNET, *settings)
    done = launch(PYTHON, "-c", LITTLE_MEMORY, *command[1:])
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "local.batch_size" in line
