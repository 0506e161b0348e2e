"""What the tests of whole runs share: a federation small enough to train in a second."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as main.py does, before torch is imported

REPOSITORY = Path(__file__).parent.parent
CIFAR10 = REPOSITORY.parent / "shared" / "data"  # the real pictures, where there are any

TINY = [
    "data.name=digits",
    "data.fallback=",
    "model.name=lenet",
    "clients.total=4",
    "clients.per_round=3",
    "local.steps=2",
    "local.batch_size=16",
    "local.lr=0.05",
    "pruning.density=0.05",
    "server.optimizer=FedYogi",
    "precision=fp32",
    "rounds=4",
    "checkpoint.every=2",
    "trackers=[]",
]


@pytest.fixture
def run(tmp_path):
    """run(*overrides) does a tiny run in this process: (exit status, run folder)."""
    from command_line import load_config
    from experiment import main

    def run(*overrides: str, name: str = "tiny"):
        fixed = [f"output_dir={tmp_path}", f"name={name}"]
        config = load_config(REPOSITORY / "configs/default.yaml", [*TINY, *fixed, *overrides])
        return main(config), config.run_folder

    return run


def launch(*command: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run a command of the repository with one thread per process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout
    )


def tiny_command(folder: Path, *overrides: str) -> list[str]:
    """The words after `python` for a tiny run below `folder`."""
    return ["main.py", *TINY, f"output_dir={folder}", "name=tiny", *overrides]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


PYTHON = sys.executable
SCRIPTS = Path(sys.executable).parent  # torchrun, accelerate and deepspeed of this environment
