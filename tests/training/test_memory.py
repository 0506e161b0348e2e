"""memory.py: memory that runs out is answered in one line that names the key to lower."""

import pytest
import torch

from config import ConfigError
from federation import client, federation
from training import precision
from training.memory import memory_governed_by

CUDA = (
    "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 1.00 GiB is free.\nSee documentation"
)


def run_out(*_, **__):
    raise torch.OutOfMemoryError(CUDA)


def test_a_gpu_without_room_names_the_key():
    with pytest.raises(ConfigError) as error, memory_governed_by("local.batch_size"):
        run_out()
    assert str(error.value) == (
        "local.batch_size: too much for the GPU's memory, which had no room for 20.50 GiB more; "
        "lower it, or model.width"
    )


def test_a_computer_without_room_names_the_key():
    """torch's own message: no computer has a million terabytes."""
    with pytest.raises(ConfigError, match="^key: too much for the computer's memory, which had no"):
        with memory_governed_by("key"):
            torch.empty(2**59)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shape"), memory_governed_by("key"):
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize(
    ("place", "function", "key"),
    [
        (precision, "seconds_of_a_step", "local.batch_size"),  # before the first round
        (client, "train_client", "local.batch_size"),
        (federation, "evaluate_models", "evaluation.batch_size"),
    ],
)
def test_a_run_ends_with_one_line(run, monkeypatch, capsys, place, function, key):
    monkeypatch.setattr(place, function, run_out)
    status, _ = run("precision=auto")
    error = capsys.readouterr().err
    assert status == 2 and error.startswith(f"error: {key}: too much for the GPU's memory")
    assert len(error.splitlines()) == 1
