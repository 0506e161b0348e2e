"""run_folder.py: a finished run stays as it is, and one process works in a folder at a time."""

import json

import pytest
import torch
from helpers.runs import REPOSITORY, TINY, summary

from command_line import load_config
from config import Network
from federation.synchronous import Synchronous
from network.population import make_population, read_clients
from run_folder import RunFolder


class Killed(BaseException):
    """Ends a run on the spot, past every except Exception."""


def test_a_finished_run_is_never_overwritten(run, capsys):
    _, folder = run()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run()[0] == 0
    assert "is finished" in capsys.readouterr().out
    assert run("checkpoint.resume=never")[0] == 0
    assert run("local.lr=0.01")[0] == 2
    assert "local.lr (0.05 there, 0.01 here)" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in before}


def test_resume_never_starts_again(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("run_folder.RunFolder.finish", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run()
    seen = []
    original = Synchronous.run_round
    monkeypatch.setattr(
        Synchronous,
        "run_round",
        lambda self: seen.append(self.progress.round_number) or original(self),
    )
    assert run("checkpoint.resume=never")[0] == 0
    assert seen == [0, 1, 2, 3]


def test_two_processes_do_not_share_a_run_folder(tmp_path, run, capsys):
    config = load_config(
        REPOSITORY / "configs/default.yaml", [*TINY, f"output_dir={tmp_path}", "name=tiny"]
    )
    held = RunFolder(config.run_folder)
    held.claim(config)
    assert run()[0] == 2
    assert "another process is running this" in capsys.readouterr().err


def test_clients_that_are_not_alike_are_written_down(run):
    words = ["network.links={4g: 0.5, wifi: 0.5}", "network.devices={phone: 1}"]
    _, folder = run(*words, "rounds=1")
    path = folder / "population.csv"
    drawn = make_population(Network(links={"4g": 0.5, "wifi": 0.5}, devices={"phone": 1}), 4, 1)
    for name, column in read_clients(path, 4).items():
        assert column.tolist() == getattr(drawn, name).tolist()
    _, copy = run(f"network.clients_file={path}", "rounds=1", name="copy")
    assert (copy / "population.csv").read_bytes() == path.read_bytes()
    assert (copy / "ledger.csv").read_text() == (folder / "ledger.csv").read_text()
    assert not (run("rounds=1", name="alike")[1] / "population.csv").exists()


def test_a_run_does_not_go_on_with_other_clients(run, tmp_path, monkeypatch, capsys):
    path = tmp_path / "clients.csv"
    heading = "uplink_mbps,downlink_mbps,latency_ms,ms_per_example\n"
    path.write_text(heading + "1,2,0,1\n" * 3 + "1,2,0,9\n")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Killed):
            run(f"network.clients_file={path}")
    path.write_text(heading + "1,2,0,1\n" * 3 + "1,2,0,8\n")
    assert run(f"network.clients_file={path}")[0] == 2
    assert "cannot resume, population_sha256 is not what it was" in capsys.readouterr().err


# --- what binds a folder --------------------------------------------------------------------------


def stop_after(monkeypatch, rounds: int) -> None:
    """Let runs end on the spot after so many rounds."""
    original = Synchronous.run_round

    def run_round(self):
        if self.progress.round_number == rounds:
            raise Killed
        return original(self)

    monkeypatch.setattr(Synchronous, "run_round", run_round)


@pytest.fixture
def half(run, monkeypatch, tmp_path):
    """The folder of a run that was killed in round 4, after the checkpoint of round 2."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 3)
        run()
    return tmp_path / "tiny-s1"


@pytest.mark.parametrize(
    "mistake", ["server.optimizer=FedYogu", "data.root=/nowhere", "server.optimizer=LBFGS"]
)
def test_a_start_that_failed_binds_nobody(run, tmp_path, mistake):
    root = ["data.name=cifar10"] if "root" in mistake else []
    assert run(*root, mistake)[0] == 2
    assert not (tmp_path / "tiny-s1").exists()
    assert run()[0] == 0


def test_a_folder_without_a_checkpoint_binds_nobody(run, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 1)
        run("local.lr=0.01")
    status, folder = run()
    assert status == 0 and summary(folder)["rounds_completed"] == 4
    rows = (folder / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(row)["round"] for row in rows] == [1, 2, 3, 4]


# --- files that are not what the checkpoint says --------------------------------------------------


def refused(run, capsys) -> str:
    """The one line that a run of the same command is refused with."""
    assert run()[0] == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: ") and "\n" not in line
    return line


@pytest.mark.parametrize("name", ["ledger.csv", "rounds.jsonl"])
@pytest.mark.parametrize("what", ["shorter", "missing", "empty"])
def test_a_log_that_lost_bytes_is_refused(run, half, capsys, name, what):
    path = half / name
    whole = path.read_bytes()
    path.unlink() if what == "missing" else path.write_bytes(whole[:100] * (what == "shorter"))
    assert f"{path}: has" in refused(run, capsys) and (half / "checkpoint.pt").exists()
    path.write_bytes(whole)
    assert run()[0] == 0


@pytest.mark.parametrize("text", ["", '{"dataset": {"na', "[]", "\x00\x00"])
def test_a_half_written_environment_is_refused(run, half, capsys, text):
    (half / "environment.json").write_text(text)
    assert str(half / "environment.json") in refused(run, capsys)


def test_a_missing_config_does_not_let_a_run_go_on_under_other_settings(run, half, capsys):
    (half / "config.yaml").unlink()
    assert run("local.lr=0.01")[0] == 2
    assert "another local.lr (0.05 there, 0.01 here)" in capsys.readouterr().err
    assert run()[0] == 0
    assert (half / "config.yaml").exists()


@pytest.mark.parametrize("found", ["no format", "a format of the past", "no mapping"])
def test_a_checkpoint_of_other_code_is_named(run, half, capsys, found):
    state = torch.load(half / "checkpoint.pt", weights_only=True)
    old = {"no format": {"parameters": torch.zeros(3)}, "no mapping": [1, 2]}
    torch.save(old.get(found, state | {"format": 1}), half / "checkpoint.pt")
    line = refused(run, capsys)
    assert "written by other code" in line and "remove" in line


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half", b"not a checkpoint"])
def test_a_damaged_checkpoint_is_named(run, half, capsys, content):
    (half / "checkpoint.pt").write_bytes(content)
    assert "checkpoint.pt: damaged" in refused(run, capsys)


def test_a_finished_run_without_its_checkpoint_is_not_overwritten(run, tmp_path, capsys):
    run()
    (tmp_path / "tiny-s1" / "checkpoint.pt").unlink()
    capsys.readouterr()
    assert "no checkpoint.pt" in refused(run, capsys)
    assert (tmp_path / "tiny-s1" / "summary.json").exists()


def test_a_file_system_without_locks_is_named_and_used(run, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("run_folder.fcntl.flock", no_locks)
    assert run()[0] == 0
    assert "this file system has no locks" in capsys.readouterr().err


def test_what_was_settled_is_told_and_not_compared(run, monkeypatch):
    """Its words may change between two versions of this code."""
    words = ["uplink.budget=100x", "rounds=4", "checkpoint.every=1"]
    write = RunFolder.write_environment

    def write_otherwise(self, **facts):
        facts.pop("settled")
        write(self, **facts, settled=["in other words"])

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_environment", write_otherwise)
        patch.setattr("experiment.finish", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            run(*words)
    status, _ = run(*words)
    assert status == 0
