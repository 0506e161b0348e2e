"""run_folder.py: a finished run stays as it is, and one process works in a folder at a time."""

import pytest
from helpers.runs import REPOSITORY, TINY

from command_line import load_config
from federation.synchronous import Federation
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
    original = Federation.run_round
    monkeypatch.setattr(
        Federation,
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
