"""Benchmarks in small: they run, check themselves, and their figures add up."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from afo import OURS
from cnn_model import build_network
from command_line import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    """benchmark(name) is the module of that name, as a script sees it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def rival_task(benchmark):
    return benchmark("rival_task")


SMALL = ["data.name=digits", "model.width=0.125", "local.batch_size=16", "precision=fp32"]
SMALL += ["clients.total=4", "clients.per_round=2", "local.steps=2"]


@pytest.mark.parametrize("name", ["accuracy", "kills", "memory", "rivals"])
def test_what_takes_long_can_at_least_be_started(benchmark, name):
    assert callable(benchmark(name).main)


def test_engine_on_small_networks(benchmark, tmp_path):
    engine = benchmark("engine")
    words = [*SMALL, "model.name=lenet", "model.width=1", f"output_dir={tmp_path}", "trackers=[]"]
    for name, (path, settings) in engine.CASES.items():
        steps = 1 if "DGC" in name else 40  # more than an epoch
        config = load_config(ROOT / path, [*settings, *words, "rounds=9", f"local.steps={steps}"])
        found = engine.measure(config, rounds=2)
        assert found.keys() == {"ours_seconds", "bare_seconds", "ratio"}
        assert all(value > 0 for value in found.values())


def test_updates_are_what_goes_to_the_encoder(benchmark, tmp_path, monkeypatch):
    updates = benchmark("updates")
    recipe = ("configs/cifar10_resnet18.yaml", SMALL, {"early": 1, "late": 3})
    monkeypatch.setitem(updates.RECIPES, "small", recipe)
    monkeypatch.setattr(updates, "CACHE", tmp_path)
    monkeypatch.chdir(ROOT)
    early, late = updates.load_updates("small", "nowhere")
    assert (early.moment, late.moment) == ("early", "late")
    for update in (early, late):
        vectors = update.update, update.weights, update.change
        assert all(v.shape == (update.layout.size,) and np.isfinite(v).all() for v in vectors)
    assert not early.change.any() and late.change.any()
    assert not np.array_equal(early.weights, late.weights)
    # With error feedback the later update holds all that was owed before.
    assert np.abs(late.update).sum() > 1.2 * np.abs(early.update).sum()
    monkeypatch.setattr(updates, "make_updates", None)  # they are made once
    assert np.array_equal(updates.load_updates("small", "nowhere")[1].update, late.update)


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


@pytest.mark.parametrize("style", ["ours", "published"])
def test_rivals_get_our_network_and_clients(rival_task, tmp_path, style):
    ours = build_network("cnn", 10, (32, 32), seed=0)
    initial = torch.nn.utils.parameters_to_vector(ours.parameters()).detach()
    assert len(initial) == 1_626_442
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    np.savez(
        tmp_path / "task.npz",
        images=images,
        labels=np.arange(5),
        clients=[4, 0, 2, 1, 3],
        sizes=[2, 3],
        initial=initial,
        num_classes=10,
        cohort=1,
        batch_size=2,
        lr=0.1,
    )
    task = rival_task.load_task(str(tmp_path / "task.npz"), style)
    assert [labels.tolist() for _, labels in task.clients] == [[4, 0], [2, 1, 3]]
    pictures = torch.cat([images for images, _ in task.clients])
    for channel in range(3):
        plain = images[[4, 0, 2, 1, 3], ..., channel].astype(float)
        expected = (plain - images[..., channel].mean()) / images[..., channel].std()
        np.testing.assert_allclose(pictures[..., channel], expected, atol=1e-5)
    with torch.no_grad():
        theirs = task.network.eval()(pictures)
        torch.testing.assert_close(ours.eval()(pictures.permute(0, 3, 1, 2)), theirs)
    last = task.network[0](pictures).is_contiguous(memory_format=torch.channels_last)
    assert last == (style == "ours")


@pytest.mark.slow
def test_rivals_without_rivals():
    words = ["--rounds", "4", "--json", "data.name=digits", "clients.total=30"]
    done = subprocess.run(
        [sys.executable, "benchmarks/rivals.py", *words, "clients.per_round=2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "pfl did NOT run" in done.stdout and "flower did NOT run" in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    ratios = [f"ours_vs_{name}{end}" for name in ("pfl", "flower") for end in ("", "_tuned")]
    assert [found[ratio] for ratio in ratios] == [None] * 4
    assert found["systems"]["ours"]["seconds"] > 0 and 0 < found["systems"]["ours"]["accuracy"] < 1
