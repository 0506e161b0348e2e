"""docs/extending.md: its blocks of code are pasted where they belong, and train."""

import importlib
import re
import shutil
import subprocess
import sys
from copy import copy
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers.runs import PLAIN, PYTHON, REPOSITORY, TINY, ledger, make_federation, summary

import afo
import algorithms
import compression
from bandwidth_analysis import read_run
from data import datasets
from federation.samplers import SAMPLERS
from layout import Layout

PAGE = (REPOSITORY / "docs/extending.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    [text] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return text


def blocks(title: str, language: str) -> list[tuple[str, str]]:
    """(file, code) of each block of a section; the first line of a block names its file."""
    return re.findall(rf"^```{language}\n# (\S+)\n(.*?)^```", section(title), re.M | re.S)


def command(title: str) -> list[str]:
    """The words after main.py of the command in a section."""
    [words] = re.findall(r"^python main.py (.*)$", section(title), re.M)
    return words.split()


@pytest.fixture
def paste(monkeypatch):
    """paste(title) runs a section's blocks as the ends of their files; returns the last's names."""
    tables = [compression.CODERS, afo.OURS, algorithms.ALGORITHMS, datasets.LOADERS, SAMPLERS]
    before = [copy(table) for table in tables]

    def paste(title: str) -> dict:
        for file, code in blocks(title, "python"):
            name = file.removesuffix(".py").replace("/", ".")
            if (REPOSITORY / file).exists():
                names = dict(vars(importlib.import_module(name)))
            else:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
                names = vars(sys.modules[name])
            exec(compile(code, file, "exec"), names)
        return names

    yield paste
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.extend(old) if isinstance(table, list) else table.update(old)


def one_round(folder, *overrides):
    """(the model before, the model after, the ledger's rows) of the first round."""
    federation = make_federation(folder, *PLAIN, *overrides)
    before = federation.server.parameters.detach().clone()
    _, rows = federation.run_round()
    return before, federation.server.parameters.detach(), rows


def test_a_compressor_keeps_its_promises_and_sends_nine_bits_a_value(paste, tmp_path):
    paste("A compressor")
    vector = torch.tensor([0.0, 0.75, -3.5, 1.0, 2.0**127 * 1.5, -4e-39])
    layout, draws = Layout(("w",), ((6,),)), []
    for seed in range(1000):
        payload, sent = compression.encode(vector, layout, "natural", seed=seed)
        draws.append(compression.decode(payload, layout).dense())
        assert torch.equal(draws[-1], sent.dense())
    draws = torch.stack(draws)
    by_hand = [{0.0}, {0.5, 1.0}, {-2.0, -4.0}, {1.0}, {2.0**127}, {0.0, -(2.0**-126)}]
    assert [set(column.tolist()) for column in draws.T] == by_hand
    assert draws[:, 1].mean() == pytest.approx(0.75, abs=5 * 0.25 / 1000**0.5)  # 5 deviations
    assert draws[:, 2].mean() == pytest.approx(-3.5, abs=5 * 0.87 / 1000**0.5)
    _, sent = compression.encode(vector, layout, "natural", lambda *_: np.array([1, 3]))
    assert sent.indices.tolist() == [1, 3] and sent.values[1] == 1.0
    _, _, rows = one_round(tmp_path, *command("A compressor"))
    up = [row for row in rows if row.direction == "up"]
    assert len(up) == 3
    for row in up:
        n = row.num_values
        assert row.dense_bytes == 4 * n and row.bytes == compression.OVERHEAD + n + -(-n // 8)


def test_a_server_optimizer_steps_as_by_hand_and_in_a_run(paste, tmp_path):
    lion = paste("A server optimizer")["Lion"]
    x = torch.nn.Parameter(torch.zeros(2))
    optimizer = lion([x], lr=0.5, beta1=0.5, beta2=0.75)
    steps = [
        # gradient, then by hand x and m
        ([4.0, -8.0], [-0.5, 0.5], [1.0, -2.0]),
        ([-0.5, 8.0], [-1.0, 0.0], [0.625, 0.5]),
    ]
    for gradient, expected, momentum in steps:
        x.grad = torch.tensor(gradient)
        optimizer.step()
        assert x.tolist() == expected and optimizer.state[x]["m"].tolist() == momentum
    before, after, _ = one_round(tmp_path, *command("A server optimizer"))
    moved = (after - before).abs()
    assert set(moved[moved > 0].mul(1e5).round().tolist()) == {300.0}  # lr 0.003, or nothing


def test_a_client_algorithm_bounds_each_update(paste, tmp_path):
    names = paste("A client algorithm")
    for bound, expected in (1.0, [0.6, -0.8]), (10.0, [3.0, -4.0]):
        update = torch.tensor([3.0, -4.0])
        names["ClippedRound"](bound).after_training(update, 1.0)
        assert torch.allclose(update, torch.tensor(expected))
    words = [*command("A client algorithm"), "clients.per_round=1", "local.options.bound=0.01"]
    before, after, _ = one_round(tmp_path, *words)
    assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-3)


def test_clients_take_turns(paste, tmp_path):
    paste("A way to sample clients")
    words = [*command("A way to sample clients"), "clients.total=5", "clients.per_round=2"]
    one = make_federation(tmp_path, *words)
    rounds = [one.run_round()[1] for _ in range(3)]
    cohorts = [[int(row.sender) for row in rows if row.direction == "up"] for rows in rounds]
    assert cohorts == [[0, 1], [2, 3], [0, 4]]


def test_a_data_set_is_learned_and_named(paste, run):
    paste("A data set")
    words = [*PLAIN, *command("A data set"), "local.steps=10", "local.momentum=0.9"]
    status, folder = run(*words)
    result = summary(folder)
    assert status == 0 and result["dataset"] == "stripes" and result["test_accuracy"] > 0.9


def test_a_column_of_the_ledger_is_written_and_the_analysis_goes_on(tmp_path):
    for path in [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("*/*.py")]:
        copied = tmp_path / path.relative_to(REPOSITORY)
        copied.parent.mkdir(exist_ok=True)
        shutil.copy(path, copied)
    for file in ("configs/default.yaml", "deepspeed_config.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / file, tmp_path / file)
    [(file, diff)] = blocks("A column of the ledger", "diff")
    source = (tmp_path / file).read_text()
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines()
        old = "\n".join(line[1:] for line in lines if line[0] in " -")
        new = "\n".join(line[1:] for line in lines if line[0] in " +")
        assert source.count(old) == 1
        source = source.replace(old, new)
    (tmp_path / file).write_text(source)
    words = [PYTHON, "main.py", *TINY, *PLAIN, "rounds=1", "name=column"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputFolder/column-s1"
    rows = ledger(folder)
    assert len(rows) == 6
    for row in rows:
        assert float(row["bits_per_value"]) == 8 * int(row["bytes"]) / int(row["num_values"]) > 32
    assert read_run(folder).total("bytes_up") == sum(
        int(r["bytes"]) for r in rows if r["direction"] == "up"
    )
