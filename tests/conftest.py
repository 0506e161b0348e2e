"""What all tests share: how OpenMP works, and a tiny run in this process."""

import os
import sys

import pytest
from helpers.runs import REPOSITORY, TINY

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as main.py does, before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*overrides) does a tiny run in this process: (exit status, run folder).

    Its plots, which take longer than its training, are drawn only for draws=True.
    """
    from command_line import load_config
    from experiment import main

    def run(*overrides: str, name: str = "tiny", draws: bool = False):
        fixed = [f"output_dir={tmp_path}", f"name={name}"]
        config = load_config(REPOSITORY / "configs/default.yaml", [*TINY, *fixed, *overrides])
        with monkeypatch.context() as patch:
            if not draws:
                patch.setattr("experiment.write_plots", lambda *_: [])
            return main(config), config.run_folder

    return run


@pytest.fixture
def many_switches():
    """Threads take turns a thousand times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 1000)
    yield
    sys.setswitchinterval(usual)
