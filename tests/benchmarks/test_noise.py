"""benchmarks/noise.py: its columns, against sums written out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compression import Decoded
from layout import Layout

UPDATES = torch.tensor([[1.0, 0.0], [3.0, 2.0], [0.0, 4.0]])
WEIGHTS = np.array([0.5, 0.25, 0.25])


def test_square_and_common_by_hand(benchmark):
    noise, cohort = benchmark("noise"), ([0, 1, 2], WEIGHTS, UPDATES)
    assert noise.square(cohort) == pytest.approx(0.5 * 1 + 0.25 * 13 + 0.25 * 16)
    products = {(0, 1): 3.0, (0, 2): 0.0, (1, 2): 8.0}
    pairs = {(i, j): WEIGHTS[i] * WEIGHTS[j] for i, j in products}
    expected = sum(pairs[p] * products[p] for p in products) / sum(pairs.values())
    assert noise.common(cohort) == pytest.approx(expected)


def test_what_all_have_in_common_is_estimated_without_bias(benchmark):
    noise, rng = benchmark("noise"), np.random.default_rng(0)
    found = [
        noise.common(([0, 1, 2], WEIGHTS, torch.from_numpy(2 + rng.standard_normal((3, 4)))))
        for _ in range(4000)
    ]
    assert np.mean(found) == pytest.approx(4 * 2.0**2, rel=0.02)


def test_what_arrives_is_compared_with_the_mean(benchmark):
    """Of two clients the second one's update arrives twice as large."""

    def encode(update, round_number, client):
        return None, Decoded(2, None, update.numpy() * (1 + client))

    channel = SimpleNamespace(layout=Layout(("a",), ((2,),)), encode=encode)
    agreement = SimpleNamespace(channel=lambda *_: channel)
    cohort = [0, 1], np.array([0.75, 0.25]), UPDATES[:2]
    error, mean = (0.25 * 3) ** 2 + 0.5**2, 1.5**2 + 0.5**2
    assert benchmark("noise").off_by(agreement, cohort) == pytest.approx(error / mean)


def test_a_small_run(benchmark, monkeypatch, capsys):
    words = ["data.name=digits", "clients.total=8", "clients.per_round=3", "local.epochs=1"]
    words += ["precision=fp32", "model.width=1", "data.partition.args={alpha: 1}"]
    monkeypatch.setattr("sys.argv", ["noise.py", "--root", "", "--rounds", "2", *words])
    benchmark("noise").main()
    *_, head, line = capsys.readouterr().out.splitlines()
    names, figures = head.split()[1:], list(map(float, line.split()))
    assert figures[0] == 2 and len(figures) == 8 and "1000x:" in names
    assert figures[2] < figures[4] < figures[6]  # the fewer bytes, the further off
