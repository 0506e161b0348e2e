"""budget.py: what is sent for a given number of bytes."""

from pathlib import Path

import pytest
from helpers.runs import make_federation

from command_line import load_config
from config import ConfigError
from federation.budget import ratio_of

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
    assert spent(tmp_path, "50x", *words)[0] == pytest.approx(50, rel=0.1)
    with pytest.raises(ConfigError, match=r"leaves .* set model.norm=group\(2\), or a sm"):
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
