"""densities.py: what each client's link can carry until the deadline."""

import math

import numpy as np
import pytest
import torch
from helpers.runs import make_federation

from compression import CODERS, encode
from config import ConfigError
from federation.densities import bits_at
from layout import Layout

CLIENTS = "uplink_mbps,downlink_mbps,latency_ms,ms_per_example\n"
WORDS = ["clients.total=4", "clients.per_round=4", "local.steps=1", "pruning.fit_deadline=true"]
WORDS += ["schedule.deadline_seconds=2", "pruning.density=0.5", "uplink.error_feedback=true"]


def test_bits_by_hand():
    assert bits_at(0.25, 8, with_positions=False) == 2
    entropy = 0.25 * 2 + 0.75 * math.log2(4 / 3)
    assert bits_at(0.25, 8, with_positions=True) == pytest.approx(2 + entropy)
    assert bits_at(1.0, 8, with_positions=True) == 8


@pytest.mark.parametrize(
    ("words", "soonest"),
    [
        (["pruning.method=random", "uplink.values=fp16"], 1.2),
        (
            [],
            0.4,
        ),  # int8's levels are coded in less than 8 bits, and those that are 0 do not travel
    ],
)
def test_each_update_arrives_before_the_deadline_and_not_long_before(tmp_path, words, soonest):
    path = tmp_path / "clients.csv"
    rates = [0.02, 0.05, 0.1, 100]
    path.write_text(CLIENTS + "".join(f"{rate},100,20,10\n" for rate in rates))
    one = make_federation(tmp_path, *WORDS, *words, f"network.clients_file={path}")
    row, rows = one.run_round()
    assert row["num_late"] == 0 and row["num_clients"] == 4
    updates = [row for row in rows if row.kind == "update"]
    ends = [row.start + row.seconds for row in updates]
    assert all(soonest < end < 2 for end in ends[:3]) and ends[3] < 1, (
        ends
    )  # the fast one sends all
    sent = [row.num_values for row in updates]
    assert sent[0] < sent[1] < sent[2] < sent[3] <= 0.5 * one.model.layout.size + 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["schedule.deadline_seconds=null"], "fits to schedule.deadline_seconds"),
        (["pruning.method=none"], "method none has no density"),
    ],
)
def test_without_a_deadline_or_a_density_it_is_refused(tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        make_federation(tmp_path, *WORDS, *words)


@pytest.mark.parametrize("coder", CODERS, ids=lambda coder: coder.__name__)
def test_every_coder_says_how_many_bits_a_value_takes_at_most(coder):
    """Whatever the number in its word means: bits, an error bound, or a rank."""
    rng = np.random.default_rng(0)
    layout = Layout(("w",), ((64, 64),))
    vector = torch.from_numpy(rng.standard_normal(layout.size).astype(np.float32))
    number = {"Bounded": 0.01, "PowerSgd": 4}.get(coder.__name__, coder.words.low)
    some = coder(number)
    payload, _ = encode(vector, layout, some)
    heads = 4 * layout.size / 512 + 64  # scales of qsgd's buckets and eden's blocks, the container
    assert 8 * (len(payload) - heads) <= some.bits_per_value * layout.size * 1.02
