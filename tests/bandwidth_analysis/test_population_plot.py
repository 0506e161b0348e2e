"""bandwidth_analysis/population_plot.py: whom its histograms count, and in which colours."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.run_folders import edit, write_run
from matplotlib.axes import Axes

from bandwidth_analysis import drawing, palette, plots, read_run
from bandwidth_analysis.population import NUMBERS, Population
from bandwidth_analysis.population_plot import population


def make_run(tmp_path, num_clients: int, links=("4g", "wifi"), **columns):
    """A run whose clients have the links in turn, and 1 in all columns that are not given."""
    numbers = {name: np.ones(num_clients) for name in NUMBERS} | columns
    link = np.array([links[client % len(links)] for client in range(num_clients)])
    people = Population(**numbers, link=link, device=np.full(num_clients, "constant"))
    return replace(read_run(write_run(tmp_path)), population=people)


def counts(axes: Axes) -> dict[str, float]:
    """How many clients stand in each colour."""
    found: dict[str, float] = {}
    for bar in axes.patches:
        colour = drawing.matplotlib.colors.to_hex(bar.get_facecolor()).upper()
        found[colour] = found.get(colour, 0) + bar.get_height()
    return found


@pytest.mark.parametrize("num_clients", [1, 10, 100_000])
def test_every_client_is_counted_once_in_each_panel(tmp_path, num_clients):
    speeds = np.geomspace(0.1, 900, num_clients)
    run = make_run(tmp_path, num_clients, uplink_mbps=speeds)
    up, down, latency, device = population([run]).axes
    for axes in (up, down, latency):
        half = num_clients // 2
        both = {palette.COLOURS[0]: num_clients - half}
        assert counts(axes) == both | ({palette.COLOURS[1]: half} if half else {})
    assert counts(device) == {palette.GREY: num_clients}  # which has no profile
    assert up.get_xscale() == ("log" if num_clients > 1 else "linear")
    assert down.get_xscale() == "linear"
    assert down.get_xlabel() == "Mbit/s (median 1)"
    assert drawing.render(population, [run]).startswith(b"\x89PNG")


def test_links_and_devices_have_colours_of_their_own(tmp_path):
    run = read_run(write_run(tmp_path, links=("4g", "wifi")))
    [legend] = population([run]).legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["link: 4g", "link: wifi", "device: phone"]
    assert len({patch.get_facecolor() for patch in legend.get_patches()}) == 3


def test_the_rarest_of_many_profiles_share_a_colour(tmp_path):
    links = [f"profile {place}" for place in range(9)]
    [legend] = population([make_run(tmp_path, 16, links)]).legends
    names = [text.get_text() for text in legend.get_texts()]
    # The first seven have two clients each, the last two one.
    assert names == [f"link: {name}" for name in links[:7]] + ["link: others"]


def test_no_latency_at_all_can_be_drawn(tmp_path):
    run = make_run(tmp_path, 4, latency_ms=np.zeros(4), ms_per_example=np.array([0, 1, 1, 500.0]))
    _, _, latency, device = population([run]).axes
    assert sum(counts(latency).values()) == sum(counts(device).values()) == 4


def test_a_trace_stands_in_for_a_bandwidth(tmp_path):
    folder = write_run(tmp_path, links=("4g", "wifi"))
    edit(folder / "config.yaml", "rounds:", "network: {uplink_trace: x.up}\nrounds:")
    up, down, *_ = population([read_run(folder)]).axes
    assert [text.get_text() for text in up.texts] == ["as in the trace"]
    assert not up.patches and down.patches


def test_equal_populations_share_their_panels(tmp_path):
    runs = [read_run(write_run(tmp_path, name, links=("4g", "3g"))) for name in "ab"]
    runs.append(read_run(write_run(tmp_path, "c")))
    assert "population" in plots.plots_of(runs) and "timeline" not in plots.plots_of(runs)
    figure = population(runs)
    assert len(figure.axes) == 4
    assert [part.get_suptitle() for part in figure.subfigs] == ["2 clients: a-s0, b-s0"]
