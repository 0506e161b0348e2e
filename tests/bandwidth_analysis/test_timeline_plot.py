"""bandwidth_analysis/timeline_plot.py: what its bars, labels and legend say."""

from dataclasses import replace

import matplotlib.image
import pytest
from helpers.run_folders import PLOT_NAMES, write_run
from matplotlib.figure import Figure

from bandwidth_analysis import drawing, read_run, write_plots
from bandwidth_analysis.timeline import Segment, Timeline
from bandwidth_analysis.timeline_plot import FACES, LOST, timeline


def clients_of(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_a_bar_is_a_segment(tmp_path):
    run = read_run(write_run(tmp_path))
    chain = [Segment("download", 0, 2), Segment("compute", 2, 5), Segment("upload", 5, 8, True)]
    figure = timeline([replace(run, timeline=Timeline(4, 8.0, {"17": chain}))])
    [axes] = figure.axes
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert bars == [(0, 2), (2, 5), (5, 8)]
    hatches = [bar.get_hatch() for bar in axes.patches]
    assert hatches == [None, None, LOST["hatch"]]
    assert axes.get_title() == "Round 4 of topk-s0: who did what, when"
    assert clients_of(figure) == ["17"] and axes.get_xlim() == (0, 8)
    [legend] = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["download", "compute", "upload", "idle", "late (cut off) or failed"]
    assert len(set(FACES.values())) == len(FACES)


def test_clients_stand_with_their_profiles(tmp_path):
    run = read_run(write_run(tmp_path, links=("4g", "constant")))
    assert clients_of(timeline([run])) == ["4g, phone  0", "phone  1"]


@pytest.mark.parametrize(("num_clients", "num_left_out"), [(40, 0), (41, 1), (100_000, 99_960)])
def test_at_most_forty_clients_are_drawn(tmp_path, num_clients, num_left_out):
    run = read_run(write_run(tmp_path))
    clients = {str(client): [Segment("idle", 0, 1)] for client in range(num_clients)}
    figure = timeline([replace(run, timeline=Timeline(1, 1.0, clients))])
    shown = clients_of(figure)
    assert len(set(shown)) == 40
    assert (shown[0], shown[-1]) == ("0", str(num_clients - 1))
    note = f"Left out: {num_left_out:,} of the {num_clients:,} clients"
    assert (note in figure.axes[0].get_xlabel()) == bool(num_left_out)


@pytest.mark.parametrize("num_clients", [0, 1, 500])
def test_it_is_a_picture_of_sensible_size(tmp_path, num_clients):
    run = read_run(write_run(tmp_path, fallback="No network"))
    clients = {str(client): [Segment("compute", 0, 0.5)] for client in range(num_clients)}
    run = replace(run, timeline=Timeline(1, 0.5, clients))
    path = write_plots([run], tmp_path / "plots")[len(PLOT_NAMES)]
    height, width, _ = matplotlib.image.imread(path).shape
    assert path.name == "timeline.png" and width == 1200 and 300 < height < 1500


def test_the_legend_covers_no_bar(tmp_path):
    figure = timeline([read_run(write_run(tmp_path))])
    drawing.FigureCanvasAgg(figure).draw()
    [axes], [legend] = figure.axes, figure.legends
    assert legend.get_window_extent().y1 < axes.get_tightbbox().y0
