"""The same run under python, torchrun, accelerate launch and deepspeed: one model_sha256."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.runs import PYTHON, REPOSITORY, SCRIPTS, launch, summary, tiny_command

RUN = ["model.name=resnet18", "model.width=0.0625", "data.partition.name=dirichlet"]
RUN += ["data.partition.args={alpha: 0.5, min_partition_size: 2}"]
RUN += ["downlink.mode=change", "downlink.values=qsgd4", "downlink.pruning.method=topk"]
RUN += ["downlink.pruning.density=0.1"]
RUN += ["pruning.mask.method=dynamic", "pruning.mask.density=0.5", "pruning.mask.every=2"]
LAUNCHERS = {
    "torchrun": [str(SCRIPTS / "torchrun"), "--nproc_per_node", "2"],
    "accelerate": [str(SCRIPTS / "accelerate"), "launch", "--cpu", "--num_processes", "2"],
    "deepspeed": [str(SCRIPTS / "deepspeed"), "--num_gpus", "2"],
}
PORTS = {
    "torchrun": "--master_port",
    "accelerate": "--main_process_port",
    "deepspeed": "--master_port",
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    done = launch(PYTHON, *tiny_command(folder, *RUN))
    assert done.returncode == 0, done.stderr
    return folder / "tiny-s1"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_end_with_the_model_of_one(launcher, one_rank, tmp_path):
    if launcher == "deepspeed" and not sys.platform.startswith("linux"):
        pytest.skip("DeepSpeed is for Linux only")
    port = [PORTS[launcher], str(20000 + os.getpid() % 20000)]
    done = launch(*LAUNCHERS[launcher], *port, *tiny_command(tmp_path, *RUN))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    two = tmp_path / "tiny-s1"
    assert summary(two)["model_sha256"] == summary(one_rank)["model_sha256"]
    assert (two / "ledger.csv").read_text() == (one_rank / "ledger.csv").read_text()
    assert summary(two)["test_accuracy"] == summary(one_rank)["test_accuracy"]


def test_two_ranks_score_the_weights_as_one_does(tmp_path):
    port = [PORTS["torchrun"], str(20000 + os.getpid() % 20000)]
    commands = {"one": [PYTHON], "two": [*LAUNCHERS["torchrun"], *port]}
    ends = []
    for name, command in commands.items():
        done = launch(*command, *tiny_command(tmp_path / name, "pruning.mask.method=snip"))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        folder = tmp_path / name / "tiny-s1"
        ends.append((summary(folder)["model_sha256"], (folder / "ledger.csv").read_text()))
    assert ends[0] == ends[1]


def test_kill_9_then_the_same_command(one_rank, tmp_path):
    """A real SIGKILL, wherever it falls; the resumed run ends as the one that never stopped."""
    command = [PYTHON, *tiny_command(tmp_path, *RUN)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    rounds = tmp_path / "tiny-s1" / "rounds.jsonl"
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (rounds.exists() and rounds.read_text().count("\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = launch(*command)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    resumed = tmp_path / "tiny-s1"
    assert summary(resumed)["model_sha256"] == summary(one_rank)["model_sha256"]
    assert (resumed / "ledger.csv").read_text() == (one_rank / "ledger.csv").read_text()


def test_ctrl_c_stops_all_ranks_and_either_number_of_ranks_goes_on(one_rank, tmp_path):
    port = ["--master_port", str(40000 + os.getpid() % 20000)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*LAUNCHERS["torchrun"], *port, *tiny_command(tmp_path, *RUN, "rounds=200")]
    rounds = tmp_path / "tiny-s1" / "rounds.jsonl"
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while process.poll() is None and not (rounds.exists() and rounds.read_text().count("\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)  # torchrun passes it on to its workers
    output, _ = process.communicate(timeout=120)
    assert b"interrupted; the same command goes on" in output
    again = launch(PYTHON, *tiny_command(tmp_path, *RUN, "rounds=200", "--dry_run"))
    assert again.returncode == 0
