"""bandwidth_analysis/plot_files.py: a broken matplotlib costs the plots and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from helpers.run_folders import PLOT_NAMES_OF_COLUMNS, PLOT_NAMES_OF_ONE_RUN, write_run
from helpers.runs import PYTHON, REPOSITORY

from bandwidth_analysis import AnalysisError, plots, read_run, write_plots
from bandwidth_analysis.__main__ import main


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [PYTHON, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


def fake_matplotlib(folder: Path, line: str) -> dict:
    """An installation of matplotlib that does `line` when it is imported."""
    (folder / "matplotlib").mkdir()
    (folder / "matplotlib" / "__init__.py").write_text(f"{line}\n")
    return {"PYTHONPATH": str(folder)}


def not_text(folder: Path) -> dict:
    (folder / "matplotlibrc").write_bytes(b"font.size: \xff\n")
    return {"MATPLOTLIBRC": str(folder / "matplotlibrc")}


BROKEN = {
    "backend": (lambda folder: {"MPLBACKEND": "nonsense"}, "backend"),
    "settings": (not_text, "UnicodeDecodeError"),
    "missing": (
        lambda folder: fake_matplotlib(folder, "raise ImportError('no wheel')"),
        "no wheel",
    ),
    "of another numpy": (lambda folder: fake_matplotlib(folder, "raise ValueError('ABI')"), "ABI"),
    "half installed": (lambda folder: fake_matplotlib(folder, ""), "matplotlib"),
}


@pytest.mark.parametrize(("break_it", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_matplotlib_costs_the_plots_only(tmp_path, break_it, reason):
    folder = write_run(tmp_path)
    done = python("-m", "bandwidth_analysis", str(folder), **break_it(tmp_path))
    assert done.returncode == 2 and "topk-s0" in done.stdout  # the table is printed
    error = done.stderr.splitlines()[-1]  # matplotlib's own warnings may stand before it
    assert error.startswith(f"error: {folder / 'plots'}: plots not drawn (") and reason in error
    assert error.endswith(f"; mend that, then: python -m bandwidth_analysis {folder}")
    assert "Traceback" not in done.stderr


def test_a_run_ends_well_without_matplotlib_and_is_drawn_later(run, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "bandwidth_analysis.plots")
        patch.setitem(sys.modules, "matplotlib", None)
        status, folder = run("rounds=1", draws=True)
    assert status == 0 and (folder / "summary.json").is_file()
    said = capsys.readouterr().err
    assert "plots left out" in said and "ModuleNotFoundError" in said and "Traceback" not in said
    assert main([str(folder)]) == 0
    expected = {*PLOT_NAMES_OF_ONE_RUN, *PLOT_NAMES_OF_COLUMNS}
    assert {path.name for path in (folder / "plots").iterdir()} == expected


def test_who_imports_the_package_imports_no_matplotlib():
    code = "import sys, bandwidth_analysis; sys.exit('matplotlib' in sys.modules)"
    assert python("-c", code).returncode == 0


def test_plots_do_not_depend_on_the_settings_of_the_user(tmp_path):
    run = read_run(write_run(tmp_path))
    usual = [path.read_bytes() for path in write_plots([run], tmp_path / "usual")]
    for settings in (
        {"text.usetex": True},
        {"font.family": "no such font", "font.size": 90},
        {"savefig.dpi": 1e9, "axes.formatter.use_mathtext": True, "figure.autolayout": True},
    ):
        with matplotlib.rc_context(settings):
            drawn = [path.read_bytes() for path in write_plots([run], tmp_path / "drawn")]
        assert drawn == usual


def test_a_settings_file_of_nonsense_does_no_harm(tmp_path):
    (tmp_path / "matplotlibrc").write_text("no colon\n{[\nbackend: nonsense\nfont.size: -1\n")
    folder = write_run(tmp_path)
    settings = {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    done = python("-m", "bandwidth_analysis", str(folder), **settings)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    "error",
    [ValueError("bad\nfont"), RuntimeError("x " * 9999), OSError(2, "no font"), KeyError(1)],
)
def test_a_plot_that_fails_is_named_and_the_others_are_drawn(tmp_path, monkeypatch, error):
    def fail(runs):
        raise error

    monkeypatch.setitem(plots.PLOTS, "bytes_per_round", fail)
    before = dict(matplotlib.rcParams)
    with pytest.raises(AnalysisError) as caught:
        write_plots([read_run(write_run(tmp_path))], tmp_path / "plots")
    assert f"bytes_per_round not drawn ({type(error).__name__}: " in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    drawn = {path.name for path in (tmp_path / "plots").iterdir()}
    assert drawn == set(PLOT_NAMES_OF_ONE_RUN) - {"bytes_per_round.png"}
    assert before == dict(matplotlib.rcParams)
