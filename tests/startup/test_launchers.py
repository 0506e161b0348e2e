"""The same run under python, torchrun, accelerate launch and deepspeed: one model_sha256.

And what launchers leave in the environment, and a start at which somebody is missing.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist
from accelerate.state import AcceleratorState
from helpers.runs import PYTHON, REPOSITORY, SCRIPTS, launch, rounds, summary, tiny_command

import distributed
from config import ConfigError
from startup import launchers
from startup.launchers import Launch, choose_interface, meet

RUN = ["model.name=resnet18", "model.width=0.0625", "data.partition.name=dirichlet"]
RUN += ["data.partition.args={alpha: 0.5, min_partition_size: 2}"]
RUN += ["downlink.mode=change", "downlink.values=qsgd4", "downlink.pruning.method=topk"]
RUN += ["downlink.pruning.density=0.1"]
RUN += ["pruning.mask.method=dynamic", "pruning.mask.density=0.5", "pruning.mask.every=2"]
LAUNCHERS = {
    "torchrun": [str(SCRIPTS / "torchrun"), "--nproc_per_node", "2"],
    "accelerate": [str(SCRIPTS / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"],
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
    assert all(row["bytes_between_ranks"] for row in rounds(two)), "there were two processes"


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


# --- what launchers leave in the environment ------------------------------------------------------

LAUNCHER_VARIABLES = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
LAUNCHER_VARIABLES += [*launchers.OTHER_LAUNCHERS, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"]


@pytest.fixture
def environment(monkeypatch):
    """environment(RANK=1) sets variables; all others of launchers are unset."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def environment(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return environment


PAIR = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0}
PAIR |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": 2}, "RANK is not set, but WORLD_SIZE is 2; start with torchrun, acc"),
        ({"RANK": 1}, "RANK is 1, but WORLD_SIZE is not set; start with torchrun"),
        ({"RANK": 0}, "RANK is 0, but WORLD_SIZE is not set; start with torchrun"),
        (PAIR | {"RANK": 2}, "RANK is '2', but must be a whole number from 0 to 1"),
        ({"WORLD_SIZE": 1, "RANK": 1}, "RANK is '1', but must be a whole number from 0 to 0"),
        (PAIR | {"RANK": -1}, "RANK is '-1', but must be a whole number from 0 to 1"),
        (PAIR | {"RANK": "first"}, "RANK is 'first', but must be a whole number from 0 to 1"),
        (PAIR | {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', but must be a whole number of 1 or"),
        (PAIR | {"WORLD_SIZE": 0}, "WORLD_SIZE is '0', but must be a whole number of 1 or more"),
        (PAIR | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set, but WORLD_SIZE is 2; start with"),
        (PAIR | {"MASTER_PORT": ""}, "MASTER_PORT is not set, but WORLD_SIZE is 2; start with"),
        (PAIR | {"MASTER_PORT": 0}, "MASTER_PORT is '0', but must be a whole number from 1 to 6"),
        (PAIR | {"MASTER_PORT": 65536}, "MASTER_PORT is '65536', but must be a whole number fr"),
        (PAIR | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http', but must be a whole number fr"),
        ({"OMPI_COMM_WORLD_SIZE": 2}, "OMPI_COMM_WORLD_SIZE is 2, but WORLD_SIZE is not set, so"),
        ({"PMI_SIZE": 4, "PMI_RANK": 1}, "PMI_SIZE is 4, but WORLD_SIZE is not set, so the pro"),
        ({"MV2_COMM_WORLD_SIZE": 3}, "MV2_COMM_WORLD_SIZE is 3, but WORLD_SIZE is not set"),
        ({"SLURM_STEP_NUM_TASKS": 8, "SLURM_PROCID": 0}, "SLURM_STEP_NUM_TASKS is 8, but WORLD"),
        ({"ACCELERATE_USE_CPU": "perhaps"}, "ACCELERATE_USE_CPU is 'perhaps', but must be true"),
        ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP is true, which has no effect here"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "no effect here: use distributed.engine=deepspeed"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "which has no effect here: use precision"),
        ({"ACCELERATE_MIXED_PRECISION": "half"}, "which has no effect here: use precision"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": 4}, "no effect here: use local.batch_size"),
        ({"ACCELERATE_TORCH_DEVICE": "cuda:7"}, "which has no effect here: use device"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "no effect here: models are not compiled"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(run, environment, capsys, variables, message):
    """One line that names the variable; nothing is begun."""
    environment(**variables)
    status, folder = run()
    error = capsys.readouterr().err
    assert status == 2 and not folder.exists()
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_gpu_needs_a_local_rank(environment):
    environment(**PAIR | {"LOCAL_RANK": ""})
    assert launchers.read_launch(on_cpu=True) == Launch(0, 2, "127.0.0.1", 29500)
    with pytest.raises(ConfigError, match="LOCAL_RANK is not set, but WORLD_SIZE is 2; start wi"):
        launchers.read_launch(on_cpu=False)


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": 1, "OMPI_COMM_WORLD_SIZE": 2, "PMI_SIZE": 2, "SLURM_STEP_NUM_TASKS": 2},
        {"OMPI_COMM_WORLD_SIZE": 1, "SLURM_STEP_NUM_TASKS": 1, "SLURM_NTASKS": 8, "LOCAL_RANK": 3},
        {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "nowhere", "MASTER_PORT": 0},
        {"WORLD_SIZE": "", "RANK": "", "ACCELERATE_MIXED_PRECISION": "no"},
    ],
)
def test_one_process_needs_no_other(run, environment, capsys, variables):
    """WORLD_SIZE=1 makes separate runs of mpirun's or srun's processes, as in a sweep."""
    environment(**variables)
    AcceleratorState._reset_state(reset_partial_state=True)  # it reads the environment once
    status, folder = run("rounds=1")
    assert status == 0 and capsys.readouterr().err == ""
    assert not dist.is_initialized()


def test_a_master_without_others_is_said(run, environment, capsys):
    """`accelerate launch --num_processes 2` starts one process where there is no GPU."""
    environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=29500, ACCELERATE_MIXED_PRECISION="no")
    status, _ = run("rounds=1")
    error = capsys.readouterr().err
    assert status == 0 and error.startswith("warning: MASTER_ADDR is set, but WORLD_SIZE is not")


def test_accelerates_cpu_is_ours(run, environment, capsys, monkeypatch):
    environment(ACCELERATE_USE_CPU="true")
    monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda: True)
    assert run("rounds=1", "device=cuda")[0] == 2
    assert "ACCELERATE_USE_CPU is true, but device is cuda" in capsys.readouterr().err
    assert run("rounds=1")[0] == 0  # device: auto


def test_a_tracker_that_is_not_installed_is_said(run, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "get_available_trackers", list)
    assert run("rounds=1", "trackers=[tensorboard, wandb]")[0] == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" is not")[0] for line in lines] == [
        "warning: trackers: tensorboard",
        "warning: trackers: wandb",
    ]
    status, folder = run("trackers=[tensorbord]", name="misspelt")
    assert status == 2 and not folder.exists()
    assert "error: trackers: 'tensorbord' is none of Accelerate's: all" in capsys.readouterr().err


# --- a start at which somebody is missing ---------------------------------------------------------


@pytest.fixture
def listener():
    """A port of this machine at which a program listens that never answers."""
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def unused_port():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    return port


def assert_lost(run, capsys, message: str) -> None:
    begin = time.monotonic()
    status, folder = run()
    error = capsys.readouterr().err
    assert time.monotonic() - begin < 10
    assert status == 1 and not folder.exists()
    assert error.count("\n") == 1 and message in error


@pytest.fixture
def short_start(monkeypatch):
    monkeypatch.setattr(launchers, "START_SECONDS", 1)


def test_a_rank_that_never_comes_is_named(run, environment, capsys, short_start, unused_port):
    environment(**PAIR | {"WORLD_SIZE": 3, "MASTER_PORT": unused_port})
    assert_lost(run, capsys, "rank 0: error: rank 1, 2 of 3 did not start within 1 s")


@pytest.mark.parametrize("master", ["127.0.0.1", "no.such.host.invalid"])
def test_a_master_that_never_comes(run, environment, capsys, short_start, unused_port, master):
    environment(**PAIR | {"RANK": 1, "MASTER_ADDR": master, "MASTER_PORT": unused_port})
    place = f"MASTER_ADDR {master}, MASTER_PORT {unused_port}"
    assert_lost(run, capsys, f"rank 1: error: nothing answers at {place} (gave up after 1 s)")


def test_another_program_at_the_masters_port(run, environment, capsys, short_start, listener):
    """torch's own store waits for its answer without end."""
    environment(**PAIR | {"RANK": 1, "MASTER_PORT": listener})
    assert_lost(run, capsys, f"MASTER_PORT {listener} is not rank 0 of this run (gave up after")


def test_a_port_that_is_taken(run, environment, capsys, listener):
    environment(**PAIR | {"MASTER_PORT": listener})
    status, folder = run()
    error = f"error: MASTER_PORT is {listener}: address already in use; choose another\n"
    assert status == 2 and not folder.exists() and capsys.readouterr().err == error


def test_processes_that_contradict_each_other():
    store = dist.HashStore()
    end = time.monotonic() + 30
    first = threading.Thread(target=meet, args=(Launch(0, 2), store, "127.0.1.1", end))
    first.start()
    while not store.check(["master of 0"]):
        time.sleep(0.01)
    with pytest.raises(ConfigError, match="RANK is 0 in two processes; give each its own"):
        meet(Launch(0, 2), store, "10.0.0.1", end)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 3, but 2 in another process of this ru"):
        meet(Launch(2, 3), store, "10.0.0.1", end)
    assert meet(Launch(1, 2), store, "10.0.0.1", end) == ["127.0.1.1", "10.0.0.1"]
    first.join(timeout=30)
    assert not first.is_alive()


def test_work_that_takes_too_long():
    assert launchers.in_time(lambda: 7, "no") == 7
    with pytest.raises(ZeroDivisionError):
        launchers.in_time(lambda: 1 // 0, "no")
    with pytest.raises(TimeoutError, match="the work did not end"):
        launchers.in_time(lambda: time.sleep(5), "the work did not end", seconds=0.01)


# --- the network interface ------------------------------------------------------------------------


@pytest.fixture
def interfaces(monkeypatch):
    """A machine with a loopback, two networks and a card without an address."""
    internet = {"lo": ["127.0.0.1", "::1"], "eth1": ["10.0.0.7", "fe80::7%eth1"]}
    internet |= {"eth11": ["10.0.1.7"], "wlan0": []}
    card = SimpleNamespace(family=psutil.AF_LINK, address="02:fc:00:00:00:01")
    family = {True: socket.AF_INET6, False: socket.AF_INET}
    found = {
        name: [card] + [SimpleNamespace(family=family[":" in a], address=a) for a in addresses]
        for name, addresses in internet.items()
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(launchers, "source_address", {"10.0.1.7": "10.0.1.7"}.get)


@pytest.mark.parametrize(
    ("own", "masters", "chosen"),
    [
        ("127.0.0.1", ["127.0.0.1", "127.0.0.1"], "lo"),  # one machine
        ("::1", ["::1"], "lo"),
        ("10.0.0.7", ["10.0.0.1", "127.0.0.1"], "eth1"),
        ("fe80::7", ["fe80::1"], "eth1"),
        ("127.0.1.1", ["127.0.1.1", "10.0.1.7"], "eth11"),  # the master, as Debian names it
    ],
)
def test_the_interface_that_leads_to_the_master(environment, interfaces, own, masters, chosen):
    environment(GLOO_SOCKET_IFNAME="", NCCL_SOCKET_IFNAME="")
    choose_interface(own, masters)
    assert os.environ["GLOO_SOCKET_IFNAME"] == chosen
    assert os.environ["NCCL_SOCKET_IFNAME"] == f"={chosen}"


def test_the_users_interface_is_kept_if_it_is_there(environment, interfaces):
    environment(GLOO_SOCKET_IFNAME="eth1,lo")
    choose_interface("10.0.1.7", ["10.0.1.1"])
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth1,lo" and "NCCL_SOCKET_IFNAME" not in os.environ
    for absent in ("eth9", "wlan0"):
        environment(GLOO_SOCKET_IFNAME=absent)
        with pytest.raises(ConfigError, match=f"GLOO_SOCKET_IFNAME is {absent}, but .* lo, eth1, "):
            choose_interface("10.0.1.7", ["10.0.1.1"])
