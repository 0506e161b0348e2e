"""The benchmarks that need no data, on small vectors: they run, and their figures add up."""

import json
import subprocess
import sys
from pathlib import Path

from afo import OURS

ROOT = Path(__file__).parents[1]


def test_codec_on_made_vectors():
    done = subprocess.run(
        [sys.executable, "benchmarks/codec.py", "--synthetic", "--repeats", "2", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "NNCodec did NOT run" in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["payload_vs_nncodec_1pct"] is None
    for key in ("encode_vs_memcpy", "decode_vs_memcpy", "select_speedup_vs_topk"):
        assert found[key] > 0
    rows = {(row["case"], row["density"]): row for row in found["rows"]}
    gaussian, clustered = rows["Gaussian, made", 0.01], rows["clustered, made", 0.01]
    assert gaussian["nonzeros"] == 420  # 1% of 41,928, rounded up
    assert gaussian["bytes"]["grace"] == 8 * 420 and gaussian["bytes"]["fedlab"] == 12 * 420
    assert 8.0 < gaussian["bounds"]["global"] < 8.1  # H(1%) / 1% is 8.08
    assert clustered["bounds"]["layer"] < clustered["bounds"]["global"]
    assert clustered["bytes"]["ours"] < clustered["bytes"]["rice"]


def test_server_step_on_a_small_vector():
    done = subprocess.run(
        [sys.executable, "benchmarks/server_step.py", "--size", "5000", "--repeats", "3", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rows, printed = found["rows"], [line.split() for line in done.stdout.splitlines()]
    assert rows.keys() == OURS.keys()
    for name, row in rows.items():
        assert [name, f"{row['ms']:.2f}", str(row["vectors"])] in [line[:3] for line in printed]
        assert row["compiled"] > 0 and row["copies"] > 0
    assert found["ratio"] == max(rows["FedYogi"]["compiled"], rows["FedYogi"]["copies"])
