"""bandwidth_analysis on small run folders written here, with numbers computed by hand."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.text import Text

from bandwidth_analysis import AnalysisError, Run, comparison_table, plots, read_run, write_plots
from bandwidth_analysis.__main__ import main
from bandwidth_analysis.runs import run_labels

ROOT = Path(__file__).resolve().parents[2]
FALLBACK = "CIFAR-10 was not found in data/cifar10"
NOTE = "CIFAR-10 was not found in data/cifar10; these are scikit-learn's digits"
ACCURACIES = (0.25, None, 0.75)  # of rounds 1, 2, 3
PLOT_NAMES = [
    "accuracy_vs_rounds.png",
    "accuracy_vs_megabytes.png",
    "bytes_per_round.png",
    "labels_per_client.png",
]


LEDGER_COLUMNS = (
    *("round", "direction", "sender", "receiver", "kind"),
    *("bytes", "dense_bytes", "num_values", "start", "seconds"),
)


def message(round_number: int, direction: str, client: int) -> dict:
    """A row of the ledger: a model of 2 MB down, or an update of 10 kB up."""
    is_up = direction == "up"
    ends = (client, "server") if is_up else ("server", client)
    what = ("update", 10_000, 4_000_000, 2000) if is_up else ("model", 2_000_000, 4_000_000, 10**6)
    row = (round_number, direction, *ends, *what, 0.0, 0.25)
    return dict(zip(LEDGER_COLUMNS, row, strict=True))


def write_run(
    parent: Path,
    name: str = "topk",
    seed: int = 0,
    accuracies: tuple = ACCURACIES,
    bytes_up: int = 10_000,  # of each update, next to 4,000,000 dense
    finished: bool = True,
    fallback: str = "",
    num_clients: int = 2,
    class_names: tuple = ("cat", "dog", "ship"),
) -> Path:
    """A run folder in which two clients a round send an update and receive a model of 2 MB."""
    folder = parent / f"{name}-s{seed}"
    folder.mkdir(parents=True)
    config = {"name": name, "seed": seed, "rounds": 3, "model": {"name": "resnet18"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    dataset = {"name": "digits", "fingerprint": "00", "fallback": fallback}
    (folder / "environment.json").write_text(json.dumps({"dataset": dataset}))
    ledger, rows = [], []
    for round_number, accuracy in enumerate(accuracies, start=1):
        for client in (0, 1):
            ledger += [message(round_number, "down", client), message(round_number, "up", client)]
            ledger[-1]["bytes"] = bytes_up
        rows.append({"round": round_number, "test_accuracy": accuracy, "bytes_up": 2 * bytes_up})
        rows[-1] |= {"bytes_down": 4_000_000, "simulated_seconds": 30.0, "wall_seconds": 1.5}
    with (folder / "ledger.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, LEDGER_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(ledger)
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.savez(
        folder / "partition.npz",
        labels_per_client=np.arange(3 * num_clients).reshape(num_clients, 3) + seed,
        class_names=np.array(class_names),
    )
    if finished:
        summary = {
            "rounds_completed": len(rows),
            "test_accuracy": 0.75,
            "test_accuracy_mean": 0.5,
            "test_accuracy_mean_over": 2,
            "bytes_up": 2 * bytes_up * len(rows),
            "bytes_down": 4_000_000 * len(rows),
            "dense_bytes_up": 8_000_000 * len(rows),
            "dense_bytes_down": 8_000_000 * len(rows),
            "wall_seconds": 5.0,
            "simulated_seconds": 3723.0,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def cells(run: Run) -> list[str]:
    """The run's line of the table; columns stand at least two spaces apart."""
    line = comparison_table([run]).splitlines()[3]
    return [cell.strip() for cell in line.split("  ") if cell]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def run_module(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bandwidth_analysis", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


def test_table_of_a_finished_run(tmp_path):
    # 6 updates of 10 kB for 24 MB dense, 6 models of 2 MB for 24 MB dense.
    expected = "topk-s0|digits|resnet18|3|75.00|50.00 (k=2)|0.060|12.0|400x|2x|1 h 02 min|5.0 s"
    assert cells(read_run(write_run(tmp_path))) == expected.split("|")


def test_table_of_an_unfinished_run_counts_ledger_and_rows(tmp_path):
    run = read_run(write_run(tmp_path, accuracies=(0.25, 0.5), finished=False))
    assert cells(run)[3:] == (
        "2/3 unfinished|50.00|37.50 (k=2)|0.040|8.000|400x|2x|1 min 00 s|3.0 s".split("|")
    )


def test_a_run_without_a_round_yet(tmp_path):
    folder = write_run(tmp_path, accuracies=(), finished=False)
    (folder / "rounds.jsonl").unlink()
    (folder / "ledger.csv").unlink()
    run = read_run(folder)
    assert cells(run)[3:] == "0/3 unfinished|-|- (k=0)|0.000|0.000|-|-|0.0 s|0.0 s".split("|")
    assert len(write_plots([run], tmp_path / "plots")) == 4
    assert "no round evaluated yet" in texts(plots.accuracy_vs_rounds([run]))


@pytest.mark.parametrize(
    ("name", "num_bytes"), [("rounds.jsonl", 5), ("ledger.csv", 5), ("ledger.csv", 60)]
)
def test_a_kill_in_the_last_round_costs_that_round_only(tmp_path, name, num_bytes):
    path = write_run(tmp_path, finished=False) / name
    path.write_bytes(path.read_bytes()[:-num_bytes])
    run = read_run(path.parent)
    assert run.num_rounds == 2
    assert run.total("bytes_up") == 40_000
    assert run.traffic["dense_bytes_down"].tolist() == [8_000_000, 8_000_000]


def test_messages_of_a_round_still_going_do_not_count(tmp_path):
    folder = write_run(tmp_path, finished=False)
    with (folder / "ledger.csv").open("a", encoding="utf-8") as file:
        csv.DictWriter(file, LEDGER_COLUMNS).writerow(message(4, "up", 0))
    assert read_run(folder).total("bytes_up") == 60_000


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("summary.json", '"bytes_up": 60000', '"bytes_up": 60001', "bytes_up is 60001 in summary"),
        ("summary.json", '"rounds_completed": 3', '"rounds_completed": 4', "counts 4 rounds"),
        ("summary.json", '"wall_seconds": 5.0', '"wall_seconds": "5"', "'wall_seconds' has no"),
        ("summary.json", "}", "", "half-written"),
        ("ledger.csv", "update,10000", "update,10001", "bytes_up of round 1 is 20000 in"),
        ("ledger.csv", "update,10000", "update,1e4x", "ledger.csv: damaged"),
        ("ledger.csv", "update,10000", "update,-1", "negative"),
        ("ledger.csv", "1,up,0", "-1,up,0", "below 0"),
        ("ledger.csv", ",up,", ",side,", "neither up nor down"),
        ("ledger.csv", "dense_bytes", "dense", "ledger.csv: damaged"),
        ("rounds.jsonl", '{"round": 2', '{"round": 4', "rounds.jsonl:2: should be round 2"),
        ("rounds.jsonl", '{"round": 2', '"round": 2', "rounds.jsonl:2: damaged"),
        ("rounds.jsonl", '"bytes_up": 20000', '"bytes_up": null', "rounds.jsonl:1: 'bytes_up'"),
        ("environment.json", "dataset", "data", "'dataset' has no usable value (found nothing)"),
        ("config.yaml", "seed: 0", "seed: [0", "config.yaml: damaged"),
    ],
)
def test_damage_is_refused_in_one_line(tmp_path, name, old, new, message):
    folder = write_run(tmp_path)
    edit(folder / name, old, new)
    with pytest.raises(AnalysisError) as caught:
        read_run(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["environment.json", "ledger.csv", "partition.npz"])
def test_missing_files_are_refused(tmp_path, name):
    folder = write_run(tmp_path)
    (folder / name).unlink()
    with pytest.raises(AnalysisError, match=f"{name}: cannot be read"):
        read_run(folder)


@pytest.mark.parametrize("name", ["rounds.jsonl", "ledger.csv", "partition.npz", "summary.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00PK", b"PK\x03\x04", b"[]\n"])
def test_overwritten_files_are_refused(tmp_path, name, content):
    folder = write_run(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(AnalysisError):
        read_run(folder)


def test_labels_are_short_and_never_ambiguous(tmp_path):
    folders = [
        write_run(tmp_path, "dense"),
        write_run(tmp_path / "monday", "topk"),
        write_run(tmp_path / "tuesday", "topk"),
        write_run(tmp_path, "topk", seed=1),
    ]
    labels = run_labels([read_run(folder) for folder in folders])
    assert labels == ["dense-s0", "monday/topk-s0", "tuesday/topk-s0", "topk-s1"]


@pytest.mark.parametrize("num_clients", [1, 1000])
def test_plots_are_pictures_of_sensible_size(tmp_path, num_clients):
    runs = [
        read_run(write_run(tmp_path, fallback=FALLBACK, num_clients=num_clients)),
        read_run(write_run(tmp_path, seed=1, finished=False, num_clients=num_clients)),
    ]
    paths = write_plots(runs, tmp_path / "new" / "plots")
    assert [path.name for path in paths] == PLOT_NAMES
    assert sorted(paths[0].parent.iterdir()) == sorted(paths)  # no temporary file is left
    for path in paths:
        height, width, _ = matplotlib.image.imread(path).shape
        assert width == 1200
        assert 500 <= height <= 1500


def test_every_plot_and_the_table_carry_the_fallback_note(tmp_path):
    fallen = read_run(write_run(tmp_path, fallback=FALLBACK + ".\n"))
    other = read_run(write_run(tmp_path, "other"))
    for draw in plots.PLOTS.values():
        assert NOTE in texts(draw([fallen]))
        assert f"topk-s0: {NOTE}" in texts(draw([fallen, other]))
        assert not any("CIFAR-10" in text for text in texts(draw([other])))
    assert comparison_table([fallen]).endswith("\n" + NOTE)
    assert "CIFAR-10" not in comparison_table([other])


def test_curves_hold_the_recorded_numbers(tmp_path):
    runs = [
        read_run(write_run(tmp_path)),
        read_run(write_run(tmp_path, "dense", bytes_up=4_000_000)),
    ]
    first, second = plots.accuracy_vs_rounds(runs).axes[0].lines
    assert first.get_xydata().tolist() == second.get_xydata().tolist() == [[1, 25], [3, 75]]

    dense, _, first, second = plots.accuracy_vs_megabytes(runs).axes[0].lines
    assert dense.get_xdata() == [48, 48]
    assert first.get_xydata() == pytest.approx(np.array([[4.02, 25], [12.06, 75]]))
    assert second.get_xydata() == pytest.approx(np.array([[12, 25], [36, 75]]))

    up, down = plots.bytes_per_round(runs).axes
    assert [line.get_ydata()[0] for line in up.lines] == [8e6, 8e6, 20_000, 8e6]
    assert [line.get_ydata()[0] for line in down.lines] == [8e6, 8e6, 4e6, 4e6]
    assert up.get_yscale() == "log"
    assert plots.accuracy_vs_megabytes(runs).axes[0].get_xscale() == "linear"


def test_volumes_far_apart_stand_on_a_logarithmic_axis(tmp_path):
    runs = [read_run(write_run(tmp_path)), read_run(write_run(tmp_path, "wide", bytes_up=10**9))]
    assert plots.accuracy_vs_megabytes(runs).axes[0].get_xscale() == "log"


def test_runs_of_one_partition_share_a_panel(tmp_path):
    runs = [read_run(write_run(tmp_path, name, seed)) for name in "ab" for seed in (0, 1)]
    titles = [axes.get_title() for axes in plots.labels_per_client(runs).axes]
    assert [title for title in titles if title] == [
        "Labels per client: a-s0, b-s0",
        "Labels per client: a-s1, b-s1",
    ]


def test_names_are_not_read_as_formulas(tmp_path):
    run = read_run(write_run(tmp_path, "_$x^$"))
    plots.accuracy_vs_rounds([run]).draw_without_rendering()
    assert r"_\$x^\$-s0" in texts(plots.accuracy_vs_rounds([run]))


def test_command_line_of_one_run(tmp_path):
    folder = write_run(tmp_path, finished=False)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    done = run_module(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "unfinished" in done.stdout
    assert [line.strip() for line in done.stdout.splitlines()[-4:]] == [
        str(folder / "plots" / name) for name in PLOT_NAMES
    ]
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_command_line_of_all_there_is(tmp_path, capsys):
    folder, other = write_run(tmp_path), write_run(tmp_path, seed=1)
    (tmp_path / "README.md").write_text("Runs go here.\n")
    assert main([str(path) for path in [folder, *sorted(tmp_path.iterdir())]]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("resnet18") == 2
    assert captured.err == f"skipped {tmp_path / 'README.md'}: not a run folder\n"
    assert sorted(path.name for path in (tmp_path / "comparison").iterdir()) == sorted(PLOT_NAMES)
    assert not (folder / "plots").exists() and not (other / "plots").exists()

    # Now the glob also matches the comparison folder.
    output = tmp_path / "elsewhere" / "plots"
    assert main([*map(str, sorted(tmp_path.iterdir())), "--output", str(output)]) == 0
    assert f"skipped {tmp_path / 'comparison'}" in capsys.readouterr().err
    assert len(list(output.iterdir())) == 4


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("missing", "no such folder"),
        (".", "not a run folder"),
        ("topk-s0/config.yaml", "topk-s0/config.yaml: not a run folder"),
        ("topk-s0 --output topk-s0/config.yaml", "plots cannot be written"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(tmp_path, monkeypatch, capsys, argument, message):
    write_run(tmp_path)
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


# --- text that is not ASCII -----------------------------------------------------------------------

C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("locale", [{"PYTHONUTF8": "1"}, C_LOCALE], ids=["UTF-8", "C"])
@pytest.mark.parametrize("name", ["caf\xe9", os.fsdecode(b"caf\xe9")])
def test_any_locale_can_print_any_name(tmp_path, locale, name):
    folder = write_run(tmp_path / name, name, class_names=(name, "dog", "ship"))
    done = run_module(folder, **locale)
    assert (done.returncode, done.stderr) == (0, "")
    in_ascii = name.encode("ascii", "backslashreplace").decode()
    shown = name if name.isprintable() and locale != C_LOCALE else in_ascii
    assert f"{shown}-s0" in done.stdout
    assert len(list((folder / "plots").glob("*.png"))) == 4


@pytest.mark.parametrize("name", ["two\nlines", "\udcff", "\x1b[31m"])
def test_errors_are_a_line_that_can_be_printed(tmp_path, name, capsys):
    assert main([str(tmp_path / name)]) == 2
    said = capsys.readouterr().err.removesuffix("\n")
    assert said.isprintable() and "no such folder" in said
