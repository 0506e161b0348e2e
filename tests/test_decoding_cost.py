"""What a stranger's payload costs at worst: 4 vectors of memory, 3 times a valid one's seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import REPOSITORY

CASES = [
    "rice positions, fp16",
    "rice positions, fp16, top-k",
    "a sum that overflows",
    "positions alone",
    "coded positions, eden",
    "int8, all selected",
    "qsgd8, all selected",
    "fp16, all selected",
    "kind 3",
    "kind 4",
    "kind 5",
    "kind 8",
    "kind 9",
    "a rank of 220",
]


@pytest.fixture(scope="module")
def costs() -> dict[str, dict]:
    """By case, see helpers/decoding_cost.py; on a vector of 11.1 million entries."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process's memory is read as Linux tells it")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": ".:tests",
        "MALLOC_MMAP_THRESHOLD_": "1000000",  # what is freed goes back to the system at once
    }
    command = [sys.executable, "tests/helpers/decoding_cost.py"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_a_strangers_payload_costs_no_more_than_the_page_says(case, costs):
    cost = costs[case]
    assert cost["vectors"] <= 4 + 0.05  # the interpreter's own objects
    assert cost["seconds"] <= 3 * cost["valid"]
    assert set(costs) == set(CASES)


@pytest.mark.parametrize("case", ["rice positions, fp16, top-k", "a rank of 220"])
def test_what_was_not_agreed_on_is_refused_before_any_work(case, costs):
    assert costs[case]["refused"] and costs[case]["vectors"] < 0.1
    assert costs[case]["seconds"] < 0.05  # the checksum of 24 and 40 MB
