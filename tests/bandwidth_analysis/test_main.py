"""The command line: python -m bandwidth_analysis."""

import os
import subprocess
from pathlib import Path

import pytest
from helpers.locales import LOCALES
from helpers.run_folders import PLOT_NAMES_OF_ONE_RUN, PLOT_NAMES_OF_SEEDS, edit, write_run
from helpers.runs import PYTHON, REPOSITORY

from bandwidth_analysis.__main__ import main


def run_module(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    command = [PYTHON, "-m", "bandwidth_analysis", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


def test_command_line_of_one_run(tmp_path):
    folder = write_run(tmp_path, finished=False)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    done = run_module(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "unfinished" in done.stdout
    assert [line.strip() for line in done.stdout.splitlines()[-len(PLOT_NAMES_OF_ONE_RUN) :]] == [
        str(folder / "plots" / name) for name in PLOT_NAMES_OF_ONE_RUN
    ]
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_command_line_of_all_there_is(tmp_path, capsys):
    folder, other = write_run(tmp_path), write_run(tmp_path, seed=1)
    (tmp_path / "README.md").write_text("Runs go here.\n")
    assert main([str(path) for path in [folder, *sorted(tmp_path.iterdir())]]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("resnet18") == 2
    assert captured.err == f"skipped {tmp_path / 'README.md'}: not a run folder\n"
    assert {path.name for path in (tmp_path / "comparison").iterdir()} == {*PLOT_NAMES_OF_SEEDS}
    assert not (folder / "plots").exists() and not (other / "plots").exists()

    # Now the glob also matches the comparison folder.
    output = tmp_path / "elsewhere" / "plots"
    assert main([*map(str, sorted(tmp_path.iterdir())), "--output", str(output)]) == 0
    assert f"skipped {tmp_path / 'comparison'}" in capsys.readouterr().err
    assert len(list(output.iterdir())) == len(PLOT_NAMES_OF_SEEDS)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("missing", "no such folder"),
        (".", "not a run folder"),
        ("topk-s0/config.yaml", "topk-s0/config.yaml: not a run folder"),
        ("topk-s0 --timeline 4", "topk-s0: there is no round 4; it has 3 complete rounds"),
        ("topk-s0 --timeline 0", "topk-s0: there is no round 0; it has 3 complete rounds"),
        ("topk-s0 topk-s1 --timeline 1", "--timeline: a timeline shows one run; give one run"),
        ("topk-s0 --output topk-s0/config.yaml", "plots cannot be written"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(tmp_path, monkeypatch, capsys, argument, message):
    write_run(tmp_path), write_run(tmp_path, seed=1)
    monkeypatch.chdir(tmp_path)
    assert main(argument.split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error


def test_a_damaged_run_is_one_line_and_exit_2(tmp_path):
    folder = write_run(tmp_path)
    edit(folder / "summary.json", "60000", "60001")
    done = run_module(folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {folder}: bytes_up is 60001 in summary.json but 60000 in ledger.csv; "
        "restore the file or repeat the run\n"
    )


def test_bad_folders_are_named_and_the_rest_is_shown(tmp_path, capsys):
    good, half, foreign = write_run(tmp_path), tmp_path / "half-s0", tmp_path / "foreign"
    half.mkdir(), foreign.mkdir()
    (half / "config.yaml").write_text("name: half\nseed")
    folders = [str(folder) for folder in (half, good, foreign, tmp_path / "missing")]
    for more in ([], ["--table", "text"]):
        assert main([*folders, *more]) == 1
        out, err = capsys.readouterr()
        assert "topk" in out
        left_out = [line.split(": ")[1] for line in err.splitlines()]
        assert left_out == [f"{half}/partition.npz", str(foreign), str(tmp_path / "missing")]


def test_table_draws_nothing_and_takes_a_target_and_a_baseline(tmp_path, capsys):
    topk, dense = write_run(tmp_path), write_run(tmp_path, "dense", bytes_up=4_000_000)
    before = sorted(tmp_path.rglob("*"))
    assert main([str(topk), "--target", "0.5", "--baseline", str(dense)]) == 0
    out = capsys.readouterr().out
    assert "to 50 %" in out and "2.99x less" in out and "one seed" in out
    assert main([str(topk), "--table", "csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert sorted(tmp_path.rglob("*")) == before
    assert main([str(topk), "--baseline", str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.startswith(f"error: --baseline: {tmp_path / 'no'}: no such")
    for accuracy in ("60", "x"):
        with pytest.raises(SystemExit, match="2"):
            main([str(topk), "--target", accuracy])


@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.parametrize("name", ["caf\xe9", "\u732b", os.fsdecode(b"caf\xe9")])
def test_any_locale_can_print_any_name(tmp_path, locale, name):
    folder = write_run(tmp_path / name, name, class_names=(name, "dog", "ship"))
    done = run_module(folder, **LOCALES[locale])
    assert (done.returncode, done.stderr) == (0, "")
    in_ascii = name.encode("ascii", "backslashreplace").decode()
    shown = name if name.isprintable() and locale == "UTF-8" else in_ascii
    assert f"{shown}-s0" in done.stdout
    assert len(list((folder / "plots").glob("*.png"))) == len(PLOT_NAMES_OF_ONE_RUN)


@pytest.mark.parametrize("name", ["two\nlines", "\udcff", "\x1b[31m"])
def test_errors_are_a_line_that_can_be_printed(tmp_path, name, capsys):
    assert main([str(tmp_path / name)]) == 2
    said = capsys.readouterr().err.removesuffix("\n")
    assert said.isprintable() and "no such folder" in said
