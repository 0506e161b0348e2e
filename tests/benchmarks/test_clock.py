"""benchmarks/clock.py: simulated seconds by hand, real ones in small."""

import json
import subprocess
import sys
import time

import pytest
from helpers.runs import REPOSITORY


def test_the_simulated_seconds_of_a_download_and_an_upload(benchmark):
    arrived = benchmark("clock").simulate([8.0, 80.0], None, 1_448_000)
    assert arrived.tolist() == [pytest.approx([1.514, 3.028]), pytest.approx([0.1514, 0.3028])]


def test_what_is_missing_is_said_in_one_line(benchmark, monkeypatch, capsys):
    clock = benchmark("clock")
    monkeypatch.setattr(clock.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(clock.shutil, "which", lambda tool: tool)
    assert clock.missing() == "network namespaces need root; run this with sudo"
    monkeypatch.setattr(clock.shutil, "which", lambda tool: tool if tool == "ip" else None)
    monkeypatch.setattr(sys, "argv", ["clock.py"])
    with pytest.raises(SystemExit) as stopped:
        clock.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: there is no `tc`; install iproute2\n"


@pytest.mark.parametrize("words", [["--rates", "0"], ["--sizes", "-1"], ["--server", "0"]])
def test_sizes_and_rates_are_above_zero(benchmark, monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["clock.py", *words])
    with pytest.raises(SystemExit) as stopped:
        benchmark("clock").main()
    assert stopped.value.code == 2 and "above 0" in capsys.readouterr().err


@pytest.mark.parametrize("server", [[], ["--server", "30"]])
def test_real_transfers_in_small(benchmark, server):
    clock = benchmark("clock")
    if clock.missing():
        pytest.skip(clock.missing())
    begin = time.perf_counter()
    words = ["--rates", "10", "40", "--sizes", "0.05", "0.1", "--json", *server]
    done = subprocess.run(
        [sys.executable, "benchmarks/clock.py", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if "fails here" in done.stderr:
        pytest.skip(done.stderr)  # a kernel without namespaces or tbf
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["rows"]) == 8
    assert found["worst_error"] == max(row["error"] for row in found["rows"])
    for row in found["rows"]:
        # no link is faster than its rate, but for what may be sent at once
        least = 8 * (1e6 * row["megabytes"] - clock.SHARED_BURST) / (1e6 * row["mbps"])
        assert least < row["measured"] < time.perf_counter() - begin
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert "clock" not in spaces
