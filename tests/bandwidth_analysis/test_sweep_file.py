"""bandwidth_analysis/sweep_file.py: the runs of a sweep, and its mistakes in a line each."""

import json
from itertools import product

import pytest
from helpers.configs import SWEEPS
from helpers.runs import REPOSITORY

from bandwidth_analysis.sweep import main
from bandwidth_analysis.sweep_file import read_sweep
from command_line import load_config
from config import ConfigError

HEAD = "base: configs/default.yaml\noutput_dir: outputFolder/densities\n"
GRID = "grid: {pruning.density: [0.1, 0.02], server.optimizer: [FedAvg, FedYogi]}\n"


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)

    def read(text: str):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return read_sweep(path)

    return read


def test_a_grid_has_every_combination_with_every_seed(sweep):
    found = sweep(HEAD + GRID + "seeds: [3, 4]\njobs: 2\n")
    assert (found.jobs, found.slurm, str(found.output_dir)) == (2, None, "outputFolder/densities")
    values = [
        (run.config.seed, run.config.pruning.density, run.config.server.optimizer)
        for run in found.runs
    ]
    assert values == list(product((3, 4), (0.1, 0.02), ("FedAvg", "FedYogi")))
    assert str(found.runs[3].folder) == (
        "outputFolder/densities/default+pruning.density=0.02+server.optimizer=FedYogi-s3"
    )


def test_a_run_is_what_its_command_makes_of_it(sweep):
    [run] = sweep(HEAD + "list:\n- local.lr_schedule.milestones: [2,\n    3]\n  name: 'two'\n").runs
    script, option, base, *overrides = run.words
    assert (script, option, base) == ("main.py", "--config", "configs/default.yaml")
    assert run.config == load_config(REPOSITORY / base, overrides)
    assert run.config.local.lr_schedule.milestones == [2, 3] and run.config.name == "two"
    assert run.command.startswith("python main.py --config configs/default.yaml 'local.lr_sch")


def test_what_all_runs_change_gives_way_to_what_a_run_says(sweep):
    text = "all: {rounds: 7, seed: 3}\n", "all: {rounds: 7, local.lr: 0.3}\n"
    runs = sweep(HEAD + text[1] + "list: [{name: a}, {name: b, rounds: 9}]\n").runs
    assert [(run.config.rounds, run.config.local.lr) for run in runs] == [(7, 0.3), (9, 0.3)]
    assert [run.command.count("rounds=") for run in runs] == [1, 1]
    with pytest.raises(ConfigError, match="x.yaml:3: seed: is the sweep's; use its seeds"):
        sweep(HEAD + text[0] + GRID)
    with pytest.raises(ConfigError, match="x.yaml:3: rouns: no such key"):
        sweep(HEAD + "all: {rouns: 7}\n" + GRID)


def test_slurm_takes_the_parameters_of_submitit(sweep):
    text = HEAD + GRID + "slurm:\n  slurm_partition: gpu\n  timeout_min: 60\n"
    assert sweep(text).slurm == {"slurm_partition": "gpu", "timeout_min": 60}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_of_the_repository_is_valid(monkeypatch, path):
    monkeypatch.chdir(REPOSITORY)
    assert len(read_sweep(path).runs) > 1


MISTAKES = {
    "": "a sweep is a list of `key: value` lines",
    "base: [": ":1: not valid YAML",
    HEAD + GRID + "sedes: [1]\n": ":4: sedes: no such key; did you mean 'seeds'?",
    HEAD + GRID + GRID: ":4: not valid YAML: found duplicate key grid",
    GRID: "base: missing",
    HEAD: "give either grid or list",
    HEAD + GRID + "list: [{rounds: 1}]\n": "give either grid or list",
    HEAD.replace("default", "no_such") + GRID: ":1: base: configs/no_such.yaml: no such file",
    HEAD + GRID + "jobs: 0\n": ":4: jobs: takes a whole number from 1",
    HEAD + GRID + "seeds: [a]\n": ":4: seeds: takes whole numbers",
    HEAD + "grid: {seed: [1]}\n": ":3: seed: is the sweep's; use its seeds",
    HEAD + "grid: {rounds: 3}\n": ":3: grid: rounds: takes a list of values",
    HEAD + "list:\n- {rounds: 3}\n- {local.learning_rate: 1}\n": (
        ":5: local.learning_rate: no such key; did you mean 'lr'?"
    ),
    HEAD + "list:\n- {rounds: three}\n": ":4: rounds: takes a whole number",
    HEAD + "list:\n- {rounds: 0}\n": ":4: rounds: 0 is out of range",
    HEAD + "list:\n- {rounds: 5}\n- {rounds: 5}\n": ":5: two runs would have the folder",
    HEAD + GRID + "seeds: [1, 1]\n": "two runs would have the folder",
    HEAD + "list:\n- rounds:\n  - 3\n": "write the value in one line",
}


@pytest.mark.parametrize("text", MISTAKES, ids=MISTAKES.values())
def test_a_mistake_is_a_line_with_its_place(sweep, text):
    with pytest.raises(ConfigError) as error:
        sweep(text)
    assert MISTAKES[text] in str(error.value) and "\n" not in str(error.value)


def test_a_mistake_ends_with_status_2_and_nothing_written(tmp_path, capsys):
    path = tmp_path / "x.yaml"
    path.write_text(f"base: configs/default.yaml\noutput_dir: {tmp_path}/out\nlist: [{{rouns: 1}}]")
    assert main([str(path)]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {path}:3: rouns: no such key; did you mean 'rounds'?\n"
    assert not (tmp_path / "out").exists()
    assert main([str(tmp_path / "missing.yaml")]) == 2
    assert "missing.yaml: cannot be read" in capsys.readouterr().err


def test_a_run_is_finished_where_its_folder_holds_this_very_run(sweep, tmp_path):
    def read(rounds: int):
        text = f"base: configs/default.yaml\noutput_dir: {tmp_path}\nlist: [{{name: a, "
        return sweep(text + f"rounds: {rounds}}}]").runs[0]

    run = read(3)
    assert not run.is_finished
    run.folder.mkdir()
    (run.folder / "config.yaml").write_text(run.config.to_yaml())
    assert not run.is_finished
    (run.folder / "summary.json").write_text(json.dumps({"empty_rounds": 0}))
    assert run.is_finished and not read(4).is_finished
    (run.folder / "summary.json").write_text(json.dumps({"empty_rounds": 3}))  # it failed so
    assert not run.is_finished
