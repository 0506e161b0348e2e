"""What a GPU machine must show, in one command of less than eight minutes.

    python benchmarks/gpu_check.py [--folder outputFolder/gpu_check] [--device cpu] [--small]

Each step has a time limit, after which it is interrupted, and prints its figures on a line of its
own as soon as it has them, the most wanted first: so a command that is cut off loses one line. A
step that fails is a line too, with the end of what it printed below, and the next one goes on. What
the steps print goes to FOLDER/<step>.log, and the profile's picture to FOLDER. The last line is one
JSON object; the exit status is 1 if a step failed.

What a run would measure for itself is given wherever it costs seconds or could differ between two
runs that must be equal.

CIFAR-10 is at $CIFAR, or else in ../shared/data, or else the digits take its place. With `--device
cpu --small` the same steps run on a CPU with tiny settings, which checks this script and no more.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from devices import device_name

ROOT = Path(__file__).parent.parent
GRACE = 10  # seconds that an interrupted command has to write what it knows
PFL_ROUNDS = 1500
TOLD = 15  # lines of what a failed step printed
SMALL = ["data.name=digits", "data.fallback=", "model.name=lenet", "clients.total=4"]
SMALL += ["clients.per_round=2", "local.steps=1", "local.batch_size=4", "precision=fp32"]


@dataclass(frozen=True)
class Step:
    """Commands that run one after the other, in at most `seconds` together.

    figures: from what each command printed to the step's figures; raises ValueError, whose message
    says what is wrong, if they are not what they must be. may_be_cut: its figures are right even if
    the commands had no time to end.
    """

    name: str
    seconds: float
    commands: list[list[str]]
    figures: Callable[[list[str]], dict]
    may_be_cut: bool = False


# --- the steps ------------------------------------------------------------------------------------


def make_steps(device: str, root: str, small: bool, runs: Path, folder: Path) -> list[Step]:
    """runs: an empty folder for run folders; folder: for the picture."""
    words = [f"device={device}", *(SMALL if small else [])]
    words += ["data.name=digits"] if root == "digits" else []
    data, python = [*words, f"data.root={root}"], sys.executable

    def run(name: str, config: str, *overrides: str) -> list[str]:
        fixed = [f"output_dir={runs}", f"name={name}", "trackers=[]", "evaluation.every=10"]
        return ["main.py", "--config", f"configs/{config}.yaml", *data, *fixed, *overrides]

    fixed = ["deterministic=true", "local.lanes=1", *([] if small else ["precision=bf16"])]
    twin = "cifar10_resnet18", "rounds=3", *fixed
    twins = [[python, *run(name, *twin)] for name in ("one", "two")]
    rounds = 4 if small else PFL_ROUNDS
    engine = ["benchmarks/engine.py", "--json", "--root", root, "--rounds", "1" if small else "5"]
    profile = ["benchmarks/profile_round.py", str(folder), "--json", "--root", root]
    deepspeed = run("deepspeed", *twin, "clients.per_round=2")
    launched = [find_launcher("deepspeed"), "--num_gpus", "1", *deepspeed]
    tests = ["-m", "pytest", "-q", "-o", "addopts=", "-m", "gpu", "tests/test_gpu.py"]
    if importlib.util.find_spec("xdist"):
        tests += ["-n", "4", "--dist", "worksteal"]
    return [
        Step(
            "engine",
            100,
            [[python, *engine, *words, "deterministic=true"]],
            engine_figures,
            may_be_cut=True,
        ),
        Step(
            "pfl benchmark",
            75,
            [[python, *run("pfl", "pfl_benchmark", f"rounds={rounds}")]],
            lambda _: pfl_figures(runs / "pfl-s1"),
            may_be_cut=True,
        ),
        Step("equal runs", 60, twins, lambda _: twin_figures(runs / "one-s1", runs / "two-s1")),
        Step("profile", 40, [[python, *profile, *words, *fixed]], profile_figures),
        Step("gpu tests", 85, [[python, *tests]], pytest_figures),
        Step("deepspeed", 60, [launched], lambda _: run_figures(runs / "deepspeed-s1")),
    ]


def find_launcher(name: str) -> str:
    """A launcher stands beside this Python, or else somewhere on the path."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def last_json(printed: list[str]) -> dict:
    """The JSON object with which the last command ended."""
    lines = [line for line in printed[-1].splitlines() if line.startswith("{")]
    if not lines:
        raise ValueError("it printed no JSON object")
    return json.loads(lines[-1])


def engine_figures(printed: list[str]) -> dict:
    """The worst of the cases that there was time for, and each one's."""
    found = last_json(printed)
    cases = {name: case["ratio"] for name, case in found["cases"].items()}
    return {key: found[key] for key in ("ratio", "ratio_topk") if key in found} | cases


def profile_figures(printed: list[str]) -> dict:
    found = last_json(printed)
    return {"busy": found["busy"], "round_seconds": found["seconds"]}


def pfl_figures(run: Path) -> dict:
    """The mean over the rounds that there was time for, without two of warm-up."""
    file = run / "rounds.jsonl"
    text = file.read_text() if file.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # a killed run may have written half a line
    rows = [json.loads(line) for line in whole.splitlines()]
    if len(rows) < 3:
        raise ValueError(f"it did {len(rows)} rounds")
    seconds = [row["wall_seconds"] for row in rows[2:]]
    mean = sum(seconds) / len(seconds)
    scores = [row["test_accuracy"] for row in rows if row["test_accuracy"] is not None]
    figures = {"rounds": len(rows), "seconds_a_round": mean, "seconds_1500": PFL_ROUNDS * mean}
    return figures | {"test_accuracy": scores[-1] if scores else None}


def run_figures(run: Path) -> dict:
    """Of a run that is finished."""
    if not (run / "summary.json").exists():
        raise ValueError("the run is not finished")
    summary = json.loads((run / "summary.json").read_text())
    return {key: summary[key] for key in ("test_accuracy", "wall_seconds", "model_sha256")}


def twin_figures(one: Path, two: Path) -> dict:
    first, second = run_figures(one), run_figures(two)
    if first["model_sha256"] != second["model_sha256"]:
        hashes = f"{first['model_sha256'][:8]} and {second['model_sha256'][:8]}"
        raise ValueError(f"two runs of the same command differ: model_sha256 is {hashes}")
    return {"model_sha256": first["model_sha256"], "wall_seconds": second["wall_seconds"]}


def pytest_figures(printed: list[str]) -> dict:
    """pytest's last line, such as 24 passed in 80.12s."""
    lines = [line.strip("= ") for line in printed[-1].splitlines() if " in " in line]
    if not lines:
        raise ValueError("pytest printed no result")
    return {"tests": lines[-1]}


# --- running them ---------------------------------------------------------------------------------


def run_command(command: list[str], seconds: float) -> tuple[str, int | None]:
    """What a command printed, and its exit status; None if it had to be interrupted."""
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that the signals below reach its children, too
        )
    except OSError as error:
        return f"{command[0]}: {error.strerror}", 127
    try:
        for number, patience in ((signal.SIGINT, seconds), (signal.SIGKILL, GRACE)):
            try:
                printed, _ = process.communicate(timeout=max(0.0, patience))
                return printed, process.returncode if number == signal.SIGINT else None
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, number)
        return process.communicate()[0], None
    finally:
        if process.poll() is None:  # somebody interrupts this script
            os.killpg(process.pid, signal.SIGKILL)


def last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]


def run_step(step: Step, log: Path) -> dict:
    """The step's figures, its `seconds`, and in `problem` what went wrong, or None."""
    begin, printed, problem = time.perf_counter(), [], None
    for command in step.commands:
        text, status = run_command(command, begin + step.seconds - time.perf_counter())
        printed.append(text)
        if status is None and not step.may_be_cut:
            problem = f"interrupted after {step.seconds} s"
        elif status:
            problem = f"exit status {status}: {last_line(text)}"
        if problem or status is None:
            break
    log.write_text("\n".join(printed))
    try:
        figures = step.figures(printed)
    except (ValueError, KeyError, OSError) as error:
        figures, problem = {}, problem or str(error)
    return figures | {"seconds": time.perf_counter() - begin, "problem": problem}


def in_words(found: dict) -> str:
    """A step's result on one line."""
    parts = [f"FAILED, {found['problem']}"] if found["problem"] else []
    for name, value in found.items():
        if name not in ("seconds", "problem"):
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return f"{', '.join(parts)} ({found['seconds']:.0f} s)"


def check(steps: list[Step], folder: Path) -> dict[str, dict]:
    """Run all steps, and print a line after each, and more after one that failed."""
    results = {}
    for step in steps:
        log = folder / f"{step.name.replace(' ', '_')}.log"
        found = results[step.name] = run_step(step, log)
        print(f"{step.name}: {in_words(found)}", flush=True)
        for line in log.read_text().splitlines()[-TOLD:] if found["problem"] else ():
            print(f"    {line}", flush=True)
    return results


def data_root() -> str:
    """Where CIFAR-10 is, or `digits` if it is nowhere."""
    if "CIFAR" in os.environ:
        return os.environ["CIFAR"]
    beside = ROOT.parent / "shared" / "data"
    return str(beside) if beside.exists() else "digits"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "outputFolder" / "gpu_check")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny settings")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check did NOT run: torch sees no CUDA device here")
        return 0
    root, device = data_root(), device_name(torch.device(args.device))
    print(f"device: {device}; pictures: {root}", flush=True)
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as runs:
        steps = make_steps(args.device, root, args.small, Path(runs), folder)
        results = check(steps, folder)
    print(json.dumps({"device": device, "steps": results}))
    return int(any(found["problem"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
