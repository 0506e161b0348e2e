"""bandwidth_analysis/population.py."""

import pytest
from helpers.run_folders import edit, write_run

from bandwidth_analysis import AnalysisError, read_run


def test_a_population_is_read_where_there_is_one(tmp_path):
    assert read_run(write_run(tmp_path)).population is None
    population = read_run(write_run(tmp_path, "diverse", links=("4g", "wifi"))).population
    assert population.uplink_mbps.tolist() == [1, 2]
    assert population.ms_per_example.tolist() == [5, 5]
    assert population.link.tolist() == ["4g", "wifi"]
    assert population.device.tolist() == ["phone", "phone"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("latency_ms", "latency", "damaged or half-written"),
        ("1,8,50,5,4g", "1,8,x,5,4g", "damaged or half-written"),
        (",wifi,phone\n", "", "damaged or half-written"),
        ("2,8,50,5,wifi,phone\n", "", "has 1 clients, not 2"),
        ("1,8,50,5,4g", "1,8,nan,5,4g", "latency_ms is negative or no number"),
        ("1,8,50,5,4g", "-1,8,50,5,4g", "uplink_mbps is negative or no number"),
    ],
)
def test_a_damaged_population_is_refused_in_one_line(tmp_path, old, new, message):
    folder = write_run(tmp_path, links=("4g", "wifi"))
    edit(folder / "population.csv", old, new)
    with pytest.raises(AnalysisError, match="population.csv: ") as caught:
        read_run(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
