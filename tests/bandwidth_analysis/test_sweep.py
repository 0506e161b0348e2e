"""bandwidth_analysis/sweep.py and sweep_jobs.py: runs at the same time, failures, kills."""

import fcntl
import os
import signal
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from helpers.fake_slurm import write_commands
from helpers.runs import PYTHON, REPOSITORY, TINY

from bandwidth_analysis.sweep import train
from bandwidth_analysis.sweep_file import Sweep, read_sweep
from bandwidth_analysis.sweep_jobs import machine_shares
from config import ConfigError


@dataclass
class Script:
    """A stand-in for a planned run: a line of Python."""

    code: str
    folder: Path
    is_finished: bool = False
    config = SimpleNamespace(rounds=2)

    @property
    def words(self) -> list[str]:
        return ["-c", self.code]


def scripts(folder: Path, *codes: str) -> Sweep:
    runs = [Script(code, folder / f"run{place}-s0") for place, code in enumerate(codes)]
    return Sweep(runs, folder, 2, None)


def test_failed_runs_are_listed_with_their_first_error_line(tmp_path, capsys):
    codes = (
        "print('fine')",
        "print('round 1\\nerror: no room\\nerror: more'); exit(2)",
        "raise KeyError('x')",
        "import os; os.kill(os.getpid(), 9)",
        "exit(3)",
    )
    sweep = scripts(tmp_path, *codes, "open('must not start', 'w')")
    sweep.runs[-1].is_finished = True
    assert train(sweep, "x") == 1
    out, err = capsys.readouterr()
    lines = [line.partition(" (")[0] for line in err.splitlines()]
    assert lines == [
        "failed: run1-s0: no room",
        "failed: run2-s0: KeyError: 'x'",
        "failed: run3-s0: killed by signal 9; start the sweep again, and the run resumes",
        "failed: run4-s0: exit status 3, and it said nothing",
    ]
    assert "6 runs, 1 finished before" in out
    assert any(line.startswith("finished") and "run0-s0" in line for line in out.splitlines())
    assert f"run1-s0: no room ({tmp_path}/.x-sweep/run1-s0.log)" in err


def test_as_many_runs_train_at_a_time_as_there_are_jobs(tmp_path):
    code = (
        "import os, time; from pathlib import Path; p = Path({path!r}); n = os.getpid();"
        "(p / str(n)).touch(); time.sleep(0.4);"
        "print(len(list(p.iterdir()))); (p / str(n)).unlink()"
    )
    busy = tmp_path / "busy"
    busy.mkdir()
    assert train(scripts(tmp_path, *[code.format(path=str(busy))] * 5), "x") == 0
    counts = [int(log.read_text()) for log in (tmp_path / ".x-sweep").glob("*.log")]
    assert max(counts) == 2 and len(counts) == 5


def test_each_of_several_processes_gets_a_share_of_the_machine(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert machine_shares(1) == [{}]
    shares = machine_shares(3)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["2", "5", "2"]
    assert {share["OMP_NUM_THREADS"] for share in shares} == {"2"}


def test_a_run_that_an_earlier_start_left_behind_is_waited_for(tmp_path):
    (tmp_path / "run0-s0").mkdir()
    lock = tmp_path / "run0-s0" / ".lock"
    hold = f"import fcntl, time; f = open({str(lock)!r}, 'w'); fcntl.flock(f, 2); print(flush=True)"
    other = subprocess.Popen([PYTHON, "-c", f"{hold}; time.sleep(1)"], stdout=subprocess.PIPE)
    other.stdout.readline()
    begin = time.monotonic()
    assert train(scripts(tmp_path, f"{hold.replace('2)', '6)')}"), "x") == 0
    assert time.monotonic() - begin > 0.9
    assert other.wait() == 0


def test_the_runs_of_a_sweep_are_jobs_of_slurm(tmp_path, monkeypatch, capsys):
    """A cluster that is none: submitit writes, submits and watches real job scripts."""
    write_commands(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(REPOSITORY)
    code = "import os; print(os.environ['SLURM_JOB_ID']); print('error: bad'); exit({})"
    sweep = scripts(tmp_path, code.format(0), code.format(2))
    sweep = replace(sweep, slurm={"timeout_min": 30, "slurm_partition": "gpu"})
    assert train(sweep, "x") == 1
    assert "failed: run1-s0: bad" in capsys.readouterr().err
    numbers = {(tmp_path / f".x-sweep/run{place}-s0.log").read_text()[:-12] for place in (0, 1)}
    assert len(numbers) == 2
    submitted = (tmp_path / "bin/sbatch.submitted").read_text()
    assert "#SBATCH --time=30" in submitted and "#SBATCH --partition=gpu" in submitted


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "slurm: give timeout_min"),
        ({"timeout_min": 5}, "slurm: Could not detect"),
        ({"timeout_min": 5, "slurm_partitoin": "gpu"}, "slurm_partitoin"),
    ],
)
def test_a_wrong_cluster_is_a_mistake(tmp_path, monkeypatch, parameters, message):
    if "slurm_partitoin" in parameters:
        write_commands(tmp_path / "bin")
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    sweep = replace(scripts(tmp_path, "exit(0)"), slurm=parameters)
    with pytest.raises(ConfigError, match=message):
        train(sweep, "x")


def test_a_sweep_that_is_done_already_by_another_process_is_refused(tmp_path):
    (tmp_path / ".x-sweep").mkdir()
    with open(tmp_path / ".x-sweep/.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is doing this sweep"):
            train(scripts(tmp_path, "exit(0)"), "x")


def test_an_interrupted_sweep_stops_its_runs_and_starts_no_more(tmp_path, monkeypatch, capsys):
    def interrupted(runs):
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr("bandwidth_analysis.sweep.watch", interrupted)
    begun, told = tmp_path / "begun", tmp_path / "told"
    first = (
        f"import signal, time; signal.signal(15, lambda *_: (open({str(told)!r}, 'w'), exit(130)));"
        f"open({str(begun)!r}, 'w'); time.sleep(60)"
    )
    sweep = replace(scripts(tmp_path, first, f"open({str(tmp_path / 'second')!r}, 'w')"), jobs=1)
    assert train(sweep, "x") == 130
    assert told.exists() and not (tmp_path / "second").exists()
    assert "interrupted; the same command goes on" in capsys.readouterr().err


# --- kills ----------------------------------------------------------------------------------------

SWEEP = """
base: {base}
output_dir: {folder}
seeds: [1, 2, 3]
jobs: 2
grid:
  pruning.density: [0.1, 0.02]
  server.optimizer: [FedAvg, FedYogi]
"""


def write_sweep(folder: Path) -> Path:
    """A sweep of 12 tiny runs below `folder`."""
    from command_line import load_config

    folder.mkdir()
    base, sweep = folder / "tiny.yaml", folder / "sweep.yaml"
    config = load_config(REPOSITORY / "configs/default.yaml", [*TINY, "rounds=3", "name=tiny"])
    base.write_text(config.to_yaml())
    sweep.write_text(SWEEP.format(base=base, folder=folder / "runs"))
    return sweep


def start(sweep: Path) -> subprocess.Popen:
    command = [PYTHON, "-m", "bandwidth_analysis.sweep", str(sweep)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)


def wait_for(sweep: Path, num_finished: int) -> None:
    while len(list((sweep.parent / "runs").glob("*/summary.json"))) < num_finished:
        time.sleep(0.1)
    time.sleep(2)  # by now the next runs have begun


def table(sweep: Path) -> str:
    folders = sorted(str(path) for path in (sweep.parent / "runs").iterdir() if path.name[0] != ".")
    command = [PYTHON, "-m", "bandwidth_analysis", *folders, "--table", "csv"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.slow
def test_a_sweep_that_is_killed_three_times_ends_with_the_table_of_one_that_is_not(tmp_path):
    whole, killed = write_sweep(tmp_path / "whole"), write_sweep(tmp_path / "killed")
    assert start(whole).wait() == 0

    everything = start(killed)
    wait_for(killed, 2)
    for process in [*psutil.Process(everything.pid).children(recursive=True), everything]:
        process.kill()
    everything.wait()

    only_the_sweep = start(killed)
    wait_for(killed, 5)
    only_the_sweep.kill()
    only_the_sweep.wait()

    stopped = start(killed)
    wait_for(killed, 8)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait() == 130

    assert start(killed).wait() == 0
    assert table(killed) == table(whole)
    for run in read_sweep(whole).runs:
        twin = killed.parent / "runs" / run.folder.name
        theirs, ours = ((f / "ledger.csv").read_bytes() for f in (twin, run.folder))
        assert theirs == ours
