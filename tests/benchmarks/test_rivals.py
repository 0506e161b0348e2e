"""rivals.py and its scripts: the same task for all, and what is run on a CPU and on a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import REPOSITORY

from cnn_model import build_network


@pytest.fixture
def rivals(benchmark):
    return benchmark("rivals")


@pytest.fixture
def rival_task(benchmark):
    return benchmark("rival_task")


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
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "pfl did NOT run" in done.stdout and "flower did NOT run" in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    ratios = [f"ours_vs_{name}{end}" for name in ("pfl", "flower") for end in ("", "_tuned")]
    assert [found[ratio] for ratio in ratios] == [None] * 4
    assert found["systems"]["ours"]["seconds"] > 0 and 0 < found["systems"]["ours"]["accuracy"] < 1


def test_a_gpu_is_shared_by_one_process_or_five(rivals):
    machine, task = rivals.GPU, Path("task.npz")
    assert [setting[0] for setting in machine.published + machine.tuned] == [1, 5, 1, 5]
    assert {setting[1:] for setting in machine.published} == {("fp32", "published")}

    def command(name, processes):
        setting = (processes, "bf16", "ours")
        return [str(w) for w in rivals.rival_command(machine, name, "py", setting, task, 9)]

    script = str(REPOSITORY / "benchmarks" / "pfl_rival.py")
    words = [script, "task.npz", "9", "bf16", "ours", "task.npy"]
    assert command("pfl", 1) == ["py", *words]
    five = ["py", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "5", *words]
    assert command("pfl", 5) == five
    threads = str(machine.threads(5))
    assert command("flower", 5)[-2:] == ["5", threads] and command("flower", 5)[0] == "py"


def test_ours_is_one_process_on_a_gpu_and_two_on_a_cpu(rivals, tmp_path, monkeypatch):
    seen = []

    def launch(machine, command, processes):
        seen.append((list(map(str, command)), processes))
        run = tmp_path / "pfl_benchmark-s1"
        run.mkdir(exist_ok=True)
        rows = [{"wall_seconds": n, "test_accuracy": n == 2 or None} for n in (1.0, 2.0, 3.0)]
        (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "environment.json").write_text('{"precision": "bf16"}')
        torch.save({"parameters": torch.arange(3.0)}, run / "checkpoint.pt")

    monkeypatch.setattr(rivals.Machine, "launch", launch)
    for machine in (rivals.GPU, rivals.CPU):
        words = rivals.our_words(machine, "pictures", ["seed=2"])
        run = rivals.run_ours(machine, words, 3, tmp_path)
        assert run["seconds"] == [1.0, 3.0] and run["weights"].tolist() == [0, 1, 2]
        assert run["setting"] == (machine.ours, "bf16", "ours")
    (on_gpu, one), (on_cpu, two) = seen
    assert (one, two) == (1, 2)
    assert on_gpu[:2] == [sys.executable, "main.py"] and "torch.distributed.run" in on_cpu
    assert "device=cuda" in on_gpu and "distributed.exchange=allreduce" not in on_gpu
    assert "device=cpu" in on_cpu and "distributed.exchange=allreduce" in on_cpu
    assert "data.root=pictures" in on_gpu and "seed=2" in on_gpu


def test_a_run_on_the_cpu_sees_no_gpu_and_processes_share_the_cores(rivals):
    show = (
        "import os; print([os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ['OMP_NUM_THREADS']])"
    )
    assert rivals.CPU.launch([sys.executable, "-c", show], 2) == "['', '1']\n"
    assert rivals.GPU.threads(10**6) == 1


def test_the_comparison(rivals, capsys):
    def run(seconds, **more):
        return {"seconds": [9, 9, seconds], "setting": (1, "fp32", "published")} | more

    runs = {"ours": run(0.1), "pfl": run(0.8, tuned=0.4, trials={"one": 0.8})}
    found = rivals.report(rivals.GPU, runs, {"ours": 0.7, "pfl": 0.6})
    assert found["ours_vs_pfl"] == pytest.approx(8) and found["ours_vs_flower"] is None
    assert found["ours_vs_pfl_tuned"] == pytest.approx(4) and found["ours_vs_flower_tuned"] is None
    assert found["systems"]["pfl"]["accuracy"] == 0.6
    printed = capsys.readouterr().out
    assert "8.00x    60.00%" in printed and "flower did NOT run" in printed


class OnGpu:
    """A vector that numpy cannot read before it is on the CPU."""

    def detach(self):
        return self

    def cpu(self):
        return torch.tensor([1.0, 2.0, 3.0])


def test_weights_are_written_from_a_gpu(rival_task, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "parameters_to_vector", lambda parameters: OnGpu())
    rival_task.save_weights(torch.nn.Linear(2, 1), str(tmp_path / "weights.npy"))
    assert np.load(tmp_path / "weights.npy").tolist() == [1, 2, 3]
