"""Bad input ends in one line that says what is wrong and what to do, and exit status 2."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.runs import PYTHON, REPOSITORY, TINY, launch, summary, tiny_command

from command_line import read_command_line
from experiment import main


def refused(capsys, *words: str) -> str:
    """The one line on stderr of a command line that must be refused."""
    with pytest.raises(SystemExit) as stopped:
        config, dry_run = read_command_line(
            str(REPOSITORY / "configs/default.yaml"), [*TINY, *words]
        )
        raise SystemExit(main(config, dry_run))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if not line.startswith("note:")]
    assert len(lines) == 1, lines
    return lines[0]


CASES = {
    "a misspelt key": (["server.optimiser=FedAvg"], "did you mean 'optimizer'?"),
    "a wrong type": (["rounds=many"], "rounds: takes a whole number, such as 3, not 'many'"),
    "a value out of range": (["pruning.density=1.5"], "pruning.density: 1.5 is out of range"),
    "an unknown server optimizer": (["server.optimizer=FedYogy"], "did you mean 'FedYogi'?"),
    "a setting of another optimizer": (
        ["server.momentum=0.9"],
        "FedYogi has no setting 'momentum'",
    ),
    "a missing data root": (["data.name=cifar10", "data.root=/nowhere"], "/nowhere"),
    "an unknown data set": (["data.name=cifar11"], "cifar10"),
    "too many clients": (["clients.total=5000"], "5000"),
    "an unknown partitioner": (["data.partition.name=dirichlett"], "dirichlet"),
    "a partition that cannot be met": (
        [
            "data.partition.name=dirichlet",
            "data.partition.args={alpha: 0.1, min_partition_size: 360}",
        ],
        "data.partition",
    ),
    "a diversity out of range": (["data.diversity.noise=1.5"], "data.diversity.noise: 1.5 is out"),
    "a diversity that is not a number": (["data.diversity.blur=nan"], "data.diversity.blur: nan"),
    "a misspelt diversity": (["data.diversity.color=1"], "did you mean 'colour'?"),
    "batches of one with BatchNorm": (
        ["model.name=resnet18", "model.width=0.1", "local.batch_size=1"],
        "use group(2)",
    ),
    "a graph that falls apart": (
        [
            *("schedule.name=gossip", "clients.per_round=4", "uplink.error_feedback=false"),
            *("server.optimizer=FedAvg", "schedule.graph=erdos_renyi"),
            "schedule.edge_probability=0.01",
        ],
        "schedule.graph: it falls apart, no path leads from node 0 to node ",
    ),
    "an error bound that no level can hold": (["uplink.values=bounded(1e-7)"], "uplink.values: "),
    "a server step that divides by 0": (
        ["server.optimizer=Adam", "server.options.eps=0.0", "rounds=1"],
        "made the model inf or NaN",
    ),
    "groups that do not divide": (["model.name=resnet18", "model.norm=group(7)"], "group(7)"),
    "a width that no device fits": (
        ["submodel.widths=[1,0.5]", "network.memory_gib=0.0001"],
        "network: no device can train the network: a batch takes 0.000333 GiB of memory, and the",
    ),
    "a width that groups do not divide": (
        [
            *("model.name=resnet18", "model.width=0.0625", "model.norm=group(4)"),
            "submodel.widths=[1,0.5]",
        ],
        "submodel.widths: 0.5: model.norm: group(4) does not divide the 2 channels",
    ),
    "shares that do not sum to one": (
        ["network.links={4g: 0.5, wifi: 0.4}"],
        "network.links: the shares sum to 0.9, not to 1",
    ),
    "an unknown link": (["network.links.wify=1"], "no profile 'wify'; did you mean wifi?"),
    "an unknown device": (["network.devices.toaster=1"], "did you mean phone or laptop or gpu?"),
    "a negative share": (
        ["network.devices={phone: 1.5, gpu: -0.5}"],
        "network.devices: phone: 1.5 is not a share",
    ),
    "a share that is a word": (["network.links.3g=all"], "3g: 'all' is not a share"),
    "a missing trace": (["network.uplink_trace=nowhere"], "nowhere: cannot be read: No such file"),
    "profiles beside a file": (
        ["network.clients_file=x.csv", "network.links.4g=1"],
        "network.links: clients_file says this already",
    ),
    "a spread beside a file": (
        ["network.clients_file=x.csv", "network.spread=1"],
        "network.spread: clients_file says this already",
    ),
    "a trace of availability without its file": (
        ["network.availability.name=trace"],
        "network.availability.file: goes with availability.name: trace",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_2(case, tmp_path, capsys):
    words, expected = CASES[case]
    assert expected in refused(capsys, f"output_dir={tmp_path}", *words)
    assert "error: " in refused(capsys, f"output_dir={tmp_path}", *words)


@pytest.mark.parametrize(
    "words, text, expected",
    [
        (["network.uplink_trace={}"], "1\n9\n8\n", ":3: 8 ms goes back, behind 9 ms"),
        (["network.downlink_trace={}"], "", ":1: the file is empty"),
        (
            ["network.clients_file={}"],
            "uplink_mbps\n1\n",
            ":1: the column downlink_mbps is missing",
        ),
        (
            ["network.availability.name=trace", "network.availability.file={}"],
            "client,from,to\n0,2,1\n",
            ":2: client 0: its times must go forward",
        ),
    ],
)
def test_a_wrong_file_of_the_network(tmp_path, capsys, words, text, expected):
    path = tmp_path / "file"
    path.write_text(text)
    line = refused(capsys, f"output_dir={tmp_path}/out", *(word.format(path) for word in words))
    assert line.startswith(f"error: {path}{expected}")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = refused(capsys, f"output_dir={tmp_path}/file/below")
    assert "output_dir" in line and "Not a directory" in line


def test_a_truncated_zip_even_with_a_fallback(tmp_path, capsys):
    whole = tmp_path / "whole.zip"
    shutil.make_archive(str(whole.with_suffix("")), "zip", REPOSITORY / "configs")
    (tmp_path / "cifar10.zip").write_bytes(whole.read_bytes()[:-100])
    line = refused(
        capsys,
        f"output_dir={tmp_path}",
        "data.name=cifar10",
        "data.fallback=digits",
        f"data.root={tmp_path / 'cifar10.zip'}",
    )
    assert "cifar10.zip" in line


def test_a_deepspeed_file_that_contradicts(tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 7}))
    line = refused(capsys, f"output_dir={tmp_path}", f"deepspeed_config={path}")
    assert "train_micro_batch_size_per_gpu is 7 but local.batch_size is 16" in line


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device", "ledger.csv")

    from run_folder import RunFolder

    original = RunFolder.append
    calls = []
    monkeypatch.setattr(
        RunFolder,
        "append",
        lambda *args: no_space() if calls.append(1) or len(calls) > 3 else original(*args),
    )
    line = refused(capsys, f"output_dir={tmp_path}", "name=default")
    assert line == "error: ledger.csv: No space left on device"
    state = torch.load(tmp_path / "default-s1" / "checkpoint.pt", weights_only=True)
    assert state["progress"]["round_number"] == 2


def test_the_command_itself_prints_one_line_and_no_traceback(tmp_path):
    done = launch(PYTHON, "main.py", "server.leraning_rate=0.1", f"output_dir={tmp_path}")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: command line: server.leraning_rate: no such key; did you mean 'lr'?\n"
    )
    done = launch(PYTHON, "main.py", "data.root=/nowhere", f"output_dir={tmp_path}")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: data.root: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts file systems")
def test_a_disk_that_is_really_full_and_then_read_only(tmp_path):
    """One line, exit 2; the last good checkpoint goes on where there is room again."""
    disk, words = tmp_path / "disk", ["model.name=resnet18", "model.width=0.25", "rounds=6"]
    disk.mkdir()

    def mount(*options: str) -> None:
        subprocess.run(["mount", *options, str(disk)], check=True)

    def start(folder: Path) -> subprocess.CompletedProcess:
        return launch(PYTHON, *tiny_command(folder, *words))

    mount("-t", "tmpfs", "-o", "size=24m", "tmpfs")  # the second checkpoint does not fit
    try:
        full = start(disk)
        assert full.returncode == 2 and full.stderr.count("\n") == 1, full.stderr
        assert "No space left on device" in full.stderr
        saved = torch.load(disk / "tiny-s1" / "checkpoint.pt", weights_only=True)
        assert saved["progress"]["round_number"] == 2
        mount("-o", "remount,ro")
        read_only = start(disk)
        assert read_only.returncode == 2 and read_only.stderr.count("\n") == 1, read_only.stderr
        assert "Read-only file system" in read_only.stderr
        mount("-o", "remount,rw,size=200m")
        again = start(disk)
        assert again.returncode == 0 and "resuming" in again.stdout, again.stderr
        start(tmp_path)
        ends = [summary(folder / "tiny-s1")["model_sha256"] for folder in (disk, tmp_path)]
        assert ends[0] == ends[1]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
