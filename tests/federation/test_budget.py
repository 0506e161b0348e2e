"""budget.py: what is sent for a given number of bytes."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import make_federation

from command_line import load_config
from compression import parse_coder
from config import ConfigError
from federation.budget import ratio_of
from federation.densities import fit_to_budget

WORDS = ["clients.total=4", "clients.per_round=4", "local.steps=1"]


def spent(tmp_path, budget: str, *words: str) -> tuple[float, str]:
    """How many times fewer bytes than dense a round sends up, and the values that travel."""
    one = make_federation(tmp_path, *WORDS, f"uplink.budget={budget}", *words)
    _, rows = one.run_round()
    up = [row for row in rows if row.direction == "up"]
    ratio = sum(row.dense_bytes for row in up) / sum(row.bytes for row in up)
    return ratio, one.workload.config.uplink.values


@pytest.mark.parametrize(
    ("budget", "values"),
    [("8.1x", "eden4"), ("20x", "eden2"), ("32x", "eden"), ("100x", "eden("), ("1000x", "eden(")],
)
def test_a_round_lands_within_a_tenth_of_the_ratio(tmp_path, budget, values):
    ratio, chosen = spent(
        tmp_path, budget, "model.name=resnet18", "model.width=0.25", "model.norm=group(2)"
    )
    assert ratio == pytest.approx(ratio_of(budget), rel=0.1) and chosen.startswith(values)


def test_buffers_and_control_variates_are_paid_for_too(tmp_path):
    words = ["model.name=resnet18", "model.width=0.25", "local.algorithm=SCAFFOLD"]
    words += ["model.norm_policy=average"]
    assert spent(tmp_path, "50x", *words)[0] == pytest.approx(50, rel=0.1)
    with pytest.raises(ConfigError, match=r"leaves .* set model.norm_policy=static, or a sm"):
        spent(tmp_path / "too little", "1000x", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["uplink.budget=lots"], "uplink.budget: 'lots' is not how many times fewer bytes"),
        (["uplink.budget=0.5x"], "is not how many times fewer bytes"),
        (
            ["uplink.budget=100x", "pruning.mask.method=snip"],
            "does not go with pruning.mask.method",
        ),
        (["uplink.budget=100x", "submodel.widths=[1,0.5]"], "does not go with submodel.widths"),
    ],
)
def test_what_is_no_budget_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Path("configs/default.yaml"), words)


def test_a_client_sends_in_proportion_to_its_weight_and_all_together_what_was_asked(tmp_path):
    words = ["data.partition.name=dirichlet", "data.partition.args={alpha: 0.3}", "model.width=3"]
    one = make_federation(tmp_path, *WORDS, "uplink.budget=200x", *words)
    examples, bits = one.num_examples, np.array(one.workload.config.uplink.client_bits)
    np.testing.assert_allclose(bits / bits.sum(), examples / examples.sum(), rtol=1e-6)
    assert examples.max() > 2 * examples.min()
    _, rows = one.run_round()
    up = [row for row in rows if row.direction == "up"]
    ratio = sum(row.dense_bytes for row in up) / sum(row.bytes for row in up)
    assert ratio == pytest.approx(200, rel=0.1)
    assert up[examples.argmax()].bytes > 1.5 * up[examples.argmin()].bytes


def test_clients_of_equal_weight_send_alike(tmp_path):
    words = ["data.partition.name=dirichlet", "data.partition.args={alpha: 0.3}"]
    one = make_federation(
        tmp_path, *WORDS, "uplink.budget=200x", "server.weighting=uniform", *words
    )
    assert len(set(one.workload.config.uplink.client_bits)) == 1


@pytest.mark.parametrize("budget", ["8.1x", "20x", "40x", "1000x"])
def test_the_mean_is_off_by_no_more_than_with_equal_shares(budget):
    """The error of a weighted mean, sum of weight^2 * (variance + 1) - 1, by the coders' own."""
    config = load_config(
        Path("configs/default.yaml"), ["model.name=lenet", f"uplink.budget={budget}"]
    )
    weights = np.array([1, 2, 3, 4, 10, 20, 5, 5, 2, 1])
    errors = {}
    for name, examples in {"by weight": weights, "equal": np.ones(10, int)}.items():
        fitted = fit_to_budget(config, 1_000_000, 0, examples)
        shares = fitted.uplink.client_bits or fitted.pruning.client_densities
        spread = [(1 + parse_coder(word).variance) / p for word, p in words_of(fitted, shares)]
        errors[name] = (weights**2 * spread).sum()
        assert np.mean(shares) == pytest.approx(fitted_mean(fitted), rel=1e-3)
    assert errors["by weight"] < errors["equal"]


def words_of(config, shares) -> list[tuple[str, float]]:
    """Each client's coder, and the share of the coordinates that it sends."""
    if config.uplink.client_bits:
        return [(f"eden({bits})", 1.0) for bits in shares]
    return [(config.uplink.values, density) for density in shares]


def fitted_mean(config) -> float:
    if config.uplink.client_bits:
        return float(config.uplink.values[len("eden(") : -1])
    return config.pruning.density


@pytest.mark.parametrize("values", ["eden1", "int8"])
def test_only_bits_below_one_may_differ(values):
    with pytest.raises(ConfigError, match="client_bits: .* has whole bits; it needs uplink.values"):
        words = [f"uplink.values={values}", "uplink.client_bits=[0.1,0.2]"]
        load_config(Path("configs/default.yaml"), words)


def test_what_a_budget_settles_is_recorded(run, capsys):
    status, folder = run("uplink.budget=200x", "downlink.budget=50x", "model.norm_policy=static")
    settled = json.loads((folder / "environment.json").read_text())["settled"]
    assert status == 0 and [line.partition(":")[0] for line in settled] == [
        "uplink.budget 200x",
        "downlink.budget 50x",
    ]
    printed = capsys.readouterr().out
    assert all(line in printed for line in settled)
