"""profile_round.py: intervals against a count of milliseconds, and a tiny round on a CPU."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.runs import REPOSITORY, TINY
from torch.autograd import DeviceType


@pytest.fixture
def profile_round(benchmark):
    return benchmark("profile_round")


def test_coverage_by_hand(profile_round):
    intervals = np.array([[5.0, 6.0], [1.0, 3.0], [2.0, 4.0], [2.5, 2.6], [6.0, 7.0]])
    edges = np.array([0.0, 1.0, 2.0, 4.5, 5.5, 10.0])
    expected = [0, 1, 2 / 2.5, 0.5, 1.5 / 4.5]
    np.testing.assert_allclose(profile_round.coverage(intervals, edges), expected)
    assert profile_round.coverage(np.empty((0, 2)), edges).tolist() == [0] * 5


def test_coverage_is_the_count_of_instants_in_some_interval(profile_round):
    rng = np.random.default_rng(0)
    for _ in range(50):
        starts = rng.integers(0, 90, rng.integers(1, 12))
        intervals = np.column_stack([starts, starts + rng.integers(0, 20, len(starts))])
        busy = np.zeros(120)
        for start, end in intervals:
            busy[start:end] = 1
        edges = np.arange(0, 121, 10)
        found = profile_round.coverage(intervals.astype(float), edges.astype(float))
        np.testing.assert_allclose(found, busy.reshape(12, 10).mean(1), atol=1e-12)


def event(name: str, start: float, end: float, on_gpu: bool = True, annotation: bool = False):
    return SimpleNamespace(
        name=name,
        device_type=DeviceType.CUDA if on_gpu else DeviceType.CPU,
        time_range=SimpleNamespace(start=start, end=end),
        is_user_annotation=annotation,
    )


def test_lanes_of_a_gpu_are_kernels_and_copies(profile_round):
    """Microseconds of the profiler's clock become seconds since the first event, a mark, ended."""
    events = [
        event("cudaLaunchKernel", 90, 95, on_gpu=False),
        event("gemm", 130, 150),
        event("fill", 98, 100),  # the mark
        event("Memcpy DtoH (Device -> Pinned)", 140, 170),
        event("Memset (Device)", 180, 181),
        event("a step", 100, 190, annotation=True),
    ]
    lanes = profile_round.device_lanes(events, on_gpu=True)
    assert lanes.keys() == {"kernels (GPU)", "copies (GPU)"}
    np.testing.assert_allclose(lanes["kernels (GPU)"], [[30e-6, 50e-6], [80e-6, 81e-6]])
    np.testing.assert_allclose(lanes["copies (GPU)"], [[40e-6, 70e-6]])
    recording = profile_round.Recording(100e-6, lanes)
    assert recording.share("kernels (GPU)", "copies (GPU)") == pytest.approx(0.41)
    assert recording.share("copies (GPU)") == pytest.approx(0.30)


def test_a_tiny_round_on_a_cpu(tmp_path):
    tiny = [word for word in TINY if not word.startswith(("rounds=", "checkpoint."))]
    command = [sys.executable, "benchmarks/profile_round.py", str(tmp_path / "new"), "--json"]
    command += ["--config", "configs/default.yaml", "--root", "", "device=cpu", *tiny]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 < found["busy"] <= 1 and found["seconds"] > 0
    assert found["shares"].keys() == {"operators (CPU)", "encoding (CPU)"}
    assert found["busy"] == found["shares"]["operators (CPU)"]
    assert 0 < found["shares"]["encoding (CPU)"] < 1
    assert f"busy {found['busy']:.1%}" in done.stdout
    assert (tmp_path / "new" / "round.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
