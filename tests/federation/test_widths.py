"""widths.py: who trains which width, on clients and devices given by hand."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.runs import make_federation

from config import Config, ConfigError, Schedule, Submodel
from federation.widths import Width, assign_widths

CHOICES = [Width(1.0, 100, 4.0, 1.0), Width(0.5, 25, 2.0, 0.25), Width(0.25, 7, 1.0, 0.07)]
EVEN = replace(Config(), submodel=Submodel(widths=[1.0, 0.5, 0.25]))
CAPABLE = replace(
    Config(),
    submodel=Submodel(widths=[1.0, 0.5, 0.25], assignment="capability"),
    schedule=Schedule(deadline_seconds=10.0),
)


def shares(config, memory, seconds=None, choices=CHOICES):
    """By client, the share that it trains; every client has pictures but the last one."""
    nothing = np.zeros(len(memory) + 1)
    seconds = seconds or (lambda width: nothing)
    memory, everybody = np.array([*memory, np.inf]), np.arange(len(memory))
    widths = assign_widths(config, choices, memory, everybody, seconds)
    return {client: widths.share_of(client) for client in widths.candidates.tolist()}


def test_even_is_by_the_clients_number():
    expected = {0: 1.0, 1: 0.5, 2: 0.25, 3: 1.0, 4: 0.5}
    assert shares(EVEN, [np.inf] * 5) == expected


def test_memory_narrows_a_client_and_too_little_leaves_it_out():
    # client 0 may train all and holds half, 1 may train half and holds all, 4 holds nothing
    assert shares(EVEN, [3.0, 9.0, 1.0, 4.0, 0.9]) == {0: 0.5, 1: 0.5, 2: 0.25, 3: 1.0}


def test_capability_takes_the_widest_that_is_in_time():
    speeds = np.array([1.0, 10.0, 40.0, 150.0, 1e6, 1.0])  # seconds for the whole work
    found = shares(CAPABLE, [np.inf] * 5, lambda width: speeds * width.work)
    assert found == {0: 1.0, 1: 1.0, 2: 0.5, 3: 0.25, 4: 0.25}  # the last one is late anyway
    assert shares(CAPABLE, [2.5, 9.0]) == {0: 0.5, 1: 1.0}


def test_without_narrower_widths_memory_still_decides():
    assert shares(Config(), [4.0, 3.9, np.inf], choices=CHOICES[:1]) == {0: 1.0, 2: 1.0}


def test_what_nobody_can_train_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="takes 4 GiB .* largest device has 3.5; lower"):
        shares(EVEN, [3.5, 3.0])
    with pytest.raises(ConfigError, match="submodel.widths: nobody who may train the whole"):
        shares(EVEN, [1.0, 9.0])
    with pytest.raises(ConfigError, match="submodel.widths: nobody who may train the whole"):
        shares(CAPABLE, [9.0, 9.0], lambda width: np.full(3, 11.0 * (width.share == 1)))


HEADING = "uplink_mbps,downlink_mbps,latency_ms,ms_per_example,memory_gib\n"


def test_a_run_leaves_out_who_has_too_little_memory(tmp_path):
    path = tmp_path / "clients.csv"
    rows = [f"10,50,50,5,{memory}\n" for memory in (1, 1e-4, 1, 1)]
    path.write_text(HEADING + "".join(rows))
    words = [f"network.clients_file={path}", "clients.per_round=3"]
    one = make_federation(tmp_path, *words)
    row, _ = one.run_round()
    assert one.candidates.tolist() == [0, 2, 3] and row["num_clients"] == 3
    [line] = one.widths.describe()
    assert line.startswith(
        "clients that take no part: 1, because training a batch takes 0.000333 GiB"
    )
    with pytest.raises(ConfigError, match="per_round: 4 is more than the 3 clients that take part"):
        make_federation(tmp_path, *words, "clients.per_round=4", name="few")
    path.write_text(HEADING + rows[1] * 4)
    with pytest.raises(ConfigError, match="network: no device can train the network"):
        make_federation(tmp_path, *words, name="none")


def test_gossip_needs_every_node(tmp_path):
    path = tmp_path / "clients.csv"
    path.write_text(HEADING + "".join(f"10,50,50,5,{memory}\n" for memory in (1, 1e-4, 1, 1)))
    words = ["schedule.name=gossip", "uplink.error_feedback=false", "server.optimizer=FedAvg"]
    words += [f"network.clients_file={path}", "clients.per_round=4"]
    with pytest.raises(ConfigError, match="4 is more than the 3 clients that take part"):
        make_federation(tmp_path, *words)


def test_a_narrow_client_computes_and_waits_for_less(tmp_path):
    """Its seconds on the clock are those of its slice's bytes and of its share of the work."""
    words = ["model.name=cnn", "submodel.widths=[1,0.5]", "clients.per_round=4"]
    words += ["network.latency_ms=0", "pruning.method=none", "uplink.values=fp32"]
    one = make_federation(tmp_path, *words)
    _, rows = one.run_round()
    sizes, work = one.widths.num_values.tolist(), one.widths.work
    assert sizes[0] == sizes[2] > 3 * sizes[1] == 3 * sizes[3]
    for client in range(4):
        [down] = [row for row in rows if row.receiver == str(client)]
        [up] = [row for row in rows if row.sender == str(client)]
        assert down.num_values == up.num_values == sizes[client]
        assert down.dense_bytes == up.dense_bytes == 4 * sizes[0]
        computed = up.start - down.start - down.seconds
        assert computed == pytest.approx(one.workload.num_trained[client] * 5e-3 * work[client])
    assert 0.2 < work[1] < 0.5


def test_ordered_dropout_computes_for_the_mean_of_its_widths(tmp_path):
    words = ["submodel.widths=[1,0.5,0.25]"]
    plain = make_federation(tmp_path, *words, name="plain").widths.choices
    drawn = make_federation(tmp_path, *words, "submodel.ordered_dropout=true").widths.choices
    works = [width.work for width in plain]
    assert works[0] == 1 and works[0] > works[1] > works[2]
    expected = [sum(works) / 3, sum(works[1:]) / 2, works[2]]
    assert [width.work for width in drawn] == pytest.approx(expected)
