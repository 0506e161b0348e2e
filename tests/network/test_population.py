"""network/population.py: who the clients are, drawn, mixed and read."""

import math
from dataclasses import replace

import numpy as np
import pytest

from config import Network
from network.population import Population, make_population, read_clients
from network.profiles import DEVICES, LINKS

NUMBERS = ["uplink_mbps", "downlink_mbps", "latency_ms", "jitter_ms", "loss", "ms_per_example"]


def test_without_profiles_every_client_has_the_figures_of_the_config():
    settings = Network(jitter_ms=3.0, loss=0.01)
    people = make_population(settings, 5, seed=1)
    for name in NUMBERS:
        assert getattr(people, name).tolist() == [getattr(settings, name)] * 5
    assert people.memory_gib.tolist() == [math.inf] * 5
    assert make_population(Network(memory_gib=4.0), 2, 1).memory_gib.tolist() == [4.0, 4.0]
    assert len(people) == 5 and people.uplink_trace is None
    assert list(people.columns()) == [*NUMBERS, "memory_gib", "link", "device"]


SETTINGS = Network(links={"wifi": 0.3, "4g": 0.5, "3g": 0.2}, devices={"phone": 0.8, "gpu": 0.2})


def test_a_client_stays_who_it_is_when_there_are_more_or_another_order():
    few, many = (make_population(SETTINGS, n, seed=1).columns() for n in (100, 1000))
    reordered = replace(SETTINGS, links={"3g": 0.2, "4g": 0.5, "wifi": 0.3})
    again = make_population(reordered, 100, seed=1).columns()
    other = make_population(SETTINGS, 100, seed=2).columns()
    for name, column in few.items():
        assert np.array_equal(column, many[name][:100]) and np.array_equal(column, again[name])
        if name != "loss":
            assert not np.array_equal(column, other[name])


def test_a_mixture_has_its_shares_and_each_profile_its_figures():
    people = make_population(SETTINGS, 100_000, seed=1)
    for name, share in SETTINGS.links.items():
        own, profile = people.link == name, LINKS[name]
        assert own.mean() == pytest.approx(share, abs=0.01)
        for way in ("uplink_mbps", "downlink_mbps"):
            mbps = np.log(getattr(people, way)[own])
            assert np.median(mbps) == pytest.approx(math.log(getattr(profile, way)), abs=0.04)
            # a normal that is cut at 2.5 standard deviations has 0.98 of its spread
            assert mbps.std() == pytest.approx(0.98 * profile.spread, rel=0.03)
        assert np.median(people.latency_ms[own]) == pytest.approx(profile.latency_ms, rel=0.03)
        ratio = people.jitter_ms[own] / people.latency_ms[own]
        assert ratio.tolist() == pytest.approx([profile.jitter_ms / profile.latency_ms] * own.sum())
        up, down = people.uplink_mbps[own], people.downlink_mbps[own]
        assert (up / down).std() < 1e-9 * up.max()  # a bad link is bad both ways
    for name, share in SETTINGS.devices.items():
        own, profile = people.device == name, DEVICES[name]
        assert own.mean() == pytest.approx(share, abs=0.01)
        speed = 5.0 / people.ms_per_example[own]
        assert np.median(speed) == pytest.approx(profile.speed, rel=0.04)
        assert np.log(speed).std() == pytest.approx(0.98 * profile.spread, rel=0.03)
        assert np.median(people.memory_gib[own]) == pytest.approx(profile.memory_gib, rel=0.03)
    is_4g, is_phone = people.link == "4g", people.device == "phone"
    assert (is_4g & is_phone).mean() == pytest.approx(0.4, abs=0.01)  # independent


def test_the_figures_of_the_config_can_be_medians():
    people = make_population(Network(spread=0.5), 50_000, seed=1)
    assert np.median(people.uplink_mbps) == pytest.approx(10.0, rel=0.02)
    assert np.log(people.uplink_mbps).std() == pytest.approx(0.49, rel=0.03)
    assert np.log(people.ms_per_example).std() == pytest.approx(0.49, rel=0.03)
    assert abs(np.corrcoef(people.uplink_mbps, people.ms_per_example)[0, 1]) < 0.02


@pytest.mark.parametrize("name", LINKS)
def test_profiles_are_links(name):
    people = make_population(Network(links={name: 1.0}), 100, seed=1)
    assert (people.link == name).all() and (people.uplink_mbps > 0).all()
    assert (people.loss == 0).all() and (people.latency_ms > 0).all()


CSV = "downlink_mbps,uplink_mbps,latency_ms,ms_per_example,device\n20,5,30,2.5,phone\n8,1,9,0,tv\n"


def test_clients_are_read_by_the_names_of_their_columns(tmp_path):
    path = tmp_path / "clients.csv"
    path.write_text(CSV)
    people = make_population(Network(clients_file="clients.csv"), 2, 1, tmp_path.joinpath)
    assert people.uplink_mbps.tolist() == [5.0, 1.0] and people.loss.tolist() == [0.0, 0.0]
    assert people.memory_gib.tolist() == [math.inf] * 2 and people.device.tolist() == [
        "phone",
        "tv",
    ]
    assert people.link.tolist() == ["constant"] * 2


def test_the_table_of_a_population_can_be_read_again(tmp_path):
    people = make_population(replace(SETTINGS, memory_gib=2.0), 50, seed=1)
    columns = people.columns()
    rows = [
        ",".join(columns),
        *(",".join(map(str, row)) for row in zip(*columns.values(), strict=False)),
    ]
    (tmp_path / "clients.csv").write_text("\n".join(rows))
    again = Population(**read_clients(tmp_path / "clients.csv", 50)).columns()
    for name, column in columns.items():
        assert np.array_equal(again[name], column)


@pytest.mark.parametrize(
    "change, line, reason",
    [
        (("20,5", "0,5"), 2, "downlink_mbps: '0' is not a number above 0"),
        (("8,1", "8,-1"), 3, "uplink_mbps: '-1' is not a number above 0"),
        (("8,1", "8,inf"), 3, "uplink_mbps: 'inf' is not a number above 0"),
        (("8,1", "8,"), 3, "uplink_mbps: '' is not a number above 0"),
        (("30,2.5", "-30,2.5"), 2, "latency_ms: '-30' is not a number at least 0"),
        (("30,2.5", "nan,2.5"), 2, "latency_ms: 'nan' is not a number at least 0"),
        ((",2.5,", ","), 2, "not 5 values as in line 1"),
        (("tv\n", "tv,\n"), 3, "not 5 values as in line 1"),
        (("8,1,9,0,tv\n", ""), 1, "1 clients do not fit clients.total=2"),
        (("latency_ms", "latency"), 1, "no column 'latency' is known; there are uplink_mbps, "),
        (("device", "uplink_mbps"), 1, "the column uplink_mbps stands there twice"),
        (("latency_ms", "loss"), 1, "the column latency_ms is missing"),
    ],
)
def test_a_wrong_file_is_answered_with_its_line(tmp_path, change, line, reason):
    path = tmp_path / "clients.csv"
    path.write_text(CSV.replace(*change))
    with pytest.raises(ValueError) as error:
        read_clients(path, 2)
    assert str(error.value).startswith(f"{path}:{line}: ") and reason in str(error.value)


def test_a_file_that_is_none_is_answered(tmp_path):
    path = tmp_path / "clients.csv"
    path.write_bytes(b"a\rb,\xff\x00")
    with pytest.raises(ValueError, match=f"{path}:"):
        read_clients(path, 2)
