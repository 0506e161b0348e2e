"""gpu_check.py: its logic with stub commands, and (slow) all its steps on a CPU."""

import json
import subprocess
import sys
import time

import pytest
from helpers.runs import REPOSITORY

SCRIPT = [sys.executable, "benchmarks/gpu_check.py"]


@pytest.fixture
def gpu_check(benchmark):
    return benchmark("gpu_check")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_step_that_fails_is_a_line_and_the_next_goes_on(gpu_check, tmp_path, capsys):
    figures = gpu_check.last_json
    steps = [
        gpu_check.Step("good", 60, [python("print('{\"ratio\": 0.25}')")], figures),
        gpu_check.Step("bad exit", 60, [python("raise SystemExit('error: no')")], figures),
        gpu_check.Step("silent", 60, [python("")], figures),
        gpu_check.Step("absent", 60, [["no-such-program"]], figures),
        gpu_check.Step("last", 60, [python("1"), python("print('{}')")], figures),
    ]
    results = gpu_check.check(steps, tmp_path)
    problems = {name: found["problem"] for name, found in results.items()}
    assert problems == {
        "good": None,
        "bad exit": "exit status 1: error: no",
        "silent": "it printed no JSON object",
        "absent": "exit status 127: no-such-program: No such file or directory",
        "last": None,
    }
    assert results["good"]["ratio"] == 0.25
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if not line.startswith("    ")]
    assert [line.partition(":")[0] for line in lines] == list(problems)
    assert lines[0].startswith("good: ratio 0.25 (")
    assert lines[1].startswith("bad exit: FAILED, exit status 1: error: no (")
    assert printed[2] == "    error: no"  # the end of what it printed
    assert (tmp_path / "bad_exit.log").read_text().strip() == "error: no"


# It counts until it is interrupted, and then says how far it came.
COUNT = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print('{"rounds": 7}')
"""


@pytest.mark.parametrize("may_be_cut", [True, False])
def test_a_step_out_of_time_is_interrupted_and_keeps_its_figures(gpu_check, tmp_path, may_be_cut):
    commands = [python(COUNT), python("print('{}')")]
    step = gpu_check.Step("count", 1, commands, gpu_check.last_json, may_be_cut)
    found = gpu_check.run_step(step, tmp_path / "log")
    assert found["rounds"] == 7 and 1 <= found["seconds"] < 30
    assert found["problem"] == (None if may_be_cut else "interrupted after 1 s")


def test_what_ignores_the_interrupt_is_killed(gpu_check, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.2)
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    begin = time.perf_counter()
    assert gpu_check.run_command(python(stubborn), 1) == ("", None)
    assert time.perf_counter() - begin < 30


def test_all_limits_together_are_under_eight_minutes(gpu_check, tmp_path):
    steps = gpu_check.make_steps("cuda", "pictures", False, tmp_path, tmp_path)
    assert sum(step.seconds + gpu_check.GRACE for step in steps) <= 480
    assert len({step.name for step in steps}) == len(steps) == 6


def test_the_engines_figures_are_those_of_the_cases_that_are_done(gpu_check, benchmark):
    engine = benchmark("engine")
    cases = {"ResNet-18, dense": {"ratio": 0.2, "lanes": "1"}}
    printed = [engine.in_json(cases, engine.torch.device("cpu"))]
    assert gpu_check.engine_figures(printed) == {"ratio": 0.2, "ResNet-18, dense": 0.2}
    cases |= {"pfl, dense": {"ratio": 0.3}, "pfl, top-k": {"ratio": 0.4}}
    printed = ["\n".join([*printed, engine.in_json(cases, engine.torch.device("cpu"))])]
    figures = gpu_check.engine_figures(printed)
    assert figures["ratio"] == 0.3 and figures["ratio_topk"] == 0.4 and len(figures) == 5


def test_figures_of_pfls_benchmark(gpu_check, tmp_path):
    """Two rounds of warm-up are left out; 1500 rounds take 1500 times the mean of the others."""
    rows = [(9.0, None), (5.0, None), (0.1, None), (0.3, 0.5), (0.2, None)]
    text = [json.dumps({"wall_seconds": s, "test_accuracy": a}) + "\n" for s, a in rows]
    (tmp_path / "rounds.jsonl").write_text("".join(text) + '{"wall_sec')
    figures = gpu_check.pfl_figures(tmp_path)
    assert figures["rounds"] == 5 and figures["test_accuracy"] == 0.5
    assert figures["seconds_a_round"] == pytest.approx(0.2)
    assert figures["seconds_1500"] == pytest.approx(300)
    with pytest.raises(ValueError, match="it did 0 rounds"):
        gpu_check.pfl_figures(tmp_path / "nothing")


def test_runs_that_differ_are_a_failure(gpu_check, tmp_path):
    for name, digest in (("one", "aa"), ("two", "aa"), ("three", "bb")):
        (tmp_path / name).mkdir()
        summary = {"test_accuracy": 0.5, "wall_seconds": 2.0, "model_sha256": digest}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert gpu_check.twin_figures(one, two)["model_sha256"] == "aa"
    with pytest.raises(ValueError, match="model_sha256 is aa and bb"):
        gpu_check.twin_figures(one, three)
    with pytest.raises(ValueError, match="not finished"):
        gpu_check.twin_figures(one, tmp_path / "four")


def test_pytests_result(gpu_check):
    printed = "...\nFAILED tests/test_gpu.py::a - in vain\n== 1 failed, 30 passed in 80.12s ==\n"
    assert gpu_check.pytest_figures([printed]) == {"tests": "1 failed, 30 passed in 80.12s"}


def test_where_the_pictures_are(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path / "project")
    monkeypatch.delenv("CIFAR", raising=False)
    assert gpu_check.data_root() == "digits"
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert gpu_check.data_root() == str(tmp_path / "shared" / "data")
    monkeypatch.setenv("CIFAR", "pictures")
    assert gpu_check.data_root() == "pictures"


def test_without_a_gpu_it_says_so_in_one_line(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 0
    assert capsys.readouterr().out == "gpu-check did NOT run: torch sees no CUDA device here\n"


@pytest.mark.slow
def test_all_steps_in_small_on_a_cpu(tmp_path):
    words = ["--device", "cpu", "--small", "--folder", str(tmp_path)]
    done = subprocess.run([*SCRIPT, *words], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {step["problem"] for step in found["steps"].values()} == {None}
    assert found["steps"]["engine"]["ratio"] > 0 and 0 < found["steps"]["profile"]["busy"] <= 1
    assert (tmp_path / "round.png").exists()
