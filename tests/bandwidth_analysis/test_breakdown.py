"""breakdown.py and its plots: what time and bytes consist of, with numbers computed by hand."""

import matplotlib.image
import pytest
from helpers.run_folders import PLOT_NAMES, PLOT_NAMES_OF_COLUMNS, edit, write_run

from bandwidth_analysis import AnalysisError, layers_plot, plots, read_run, write_plots
from bandwidth_analysis.breakdown import REST, bytes_by_layer, megabytes_by_part, phase_seconds

TENSORS = {"conv.weight": 60, "conv.bias": 10, "block.0.a.weight": 8, "block.0.b.weight": 2}
TENSORS |= {"block.1.a.weight": 4, "scale": 1}
COLUMNS = (  # of rounds of 1.5 s; of its 20,000 bytes up, updates are all
    {
        "phase_seconds": {"train": 9.0, "encode": 9.0},
        "residual_norm": 1.0,
        "bytes_by_part": {"header": 30, "positions": 20, "values": 50},
        "bytes_by_tensor": TENSORS,
    },
    {"phase_seconds": {"train": 0.5, "encode": 0.25}, "residual_norm": 2.0},
    {
        "phase_seconds": {"train": 0.75, "evaluate": 0.5},
        "residual_norm": None,
        "bytes_by_part": {"header": 30, "positions": 40, "values": 130},
        "bytes_by_tensor": {name: 3 * number for name, number in TENSORS.items()},
    },
)


@pytest.fixture
def one(tmp_path):
    return read_run(write_run(tmp_path, columns=COLUMNS))


@pytest.fixture
def older(tmp_path):
    return read_run(write_run(tmp_path, "older"))


def test_phases_are_means_over_the_rounds_after_the_first(one, older):
    expected = {"train": 0.625, "encode": 0.125, "evaluate": 0.25, REST: 0.5}
    assert phase_seconds([one]) == phase_seconds([one, older]) == expected
    assert phase_seconds([older]) == {}


def test_threads_that_work_at_once_leave_no_rest(tmp_path):
    columns = ({"phase_seconds": {"train": 1.0, "encode": 2.0}},) * 3
    busy = read_run(write_run(tmp_path, "busy", columns=columns))
    assert phase_seconds([busy]) == {"train": 1.0, "encode": 2.0, REST: 0.0}


def test_all_bytes_up_are_split_as_the_described_updates_are(one, older, tmp_path):
    # 60,000 bytes of updates, of which on average 30, 30 and 90 of 150 are header and so on.
    expected = {"header": 0.012, "positions": 0.012, "values": 0.036}
    assert megabytes_by_part([one]) == pytest.approx(expected)
    assert megabytes_by_part([older]) == {}
    folder = write_run(tmp_path, "buffers", columns=COLUMNS)
    edit(folder / "ledger.csv", "1,server,update", "1,server,buffers")
    with_buffers = megabytes_by_part([read_run(folder)])
    assert with_buffers["buffers"] == 0.01 and sum(with_buffers.values()) == pytest.approx(0.06)


def test_tensors_of_a_layer_and_then_layers_of_a_block_are_added_up(one, older):
    layers = {"conv": 140, "block.0.a": 16, "block.0.b": 4, "block.1.a": 8, "scale": 2}
    assert bytes_by_layer([one], at_most=5) == layers
    assert list(bytes_by_layer([one], at_most=5)) == list(layers)  # in the network's order
    blocks = {"conv": 140, "block.0": 20, "block.1": 8, "scale": 2}
    assert bytes_by_layer([one], at_most=4) == blocks
    assert bytes_by_layer([one], at_most=3) == {"conv": 140, "block": 28, "scale": 2}
    assert len(bytes_by_layer([one], at_most=1)) == 3  # nothing is left to merge by
    assert bytes_by_layer([older], at_most=5) == {}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('{"train": 9.0', '{"train": "9"', "rounds.jsonl:1: phase_seconds: 'train' has no usable"),
        ('"residual_norm": 1.0', '"residual_norm": "1"', "rounds.jsonl:1: 'residual_norm'"),
        ('{"header": 30, "positions": 20, "values": 50}', "3", "rounds.jsonl:1: 'bytes_by_part'"),
    ],
)
def test_a_damaged_column_is_named(tmp_path, old, new, message):
    folder = write_run(tmp_path, columns=COLUMNS)
    edit(folder / "rounds.jsonl", old, new)
    with pytest.raises(AnalysisError, match=message):
        read_run(folder)


# --- plots ----------------------------------------------------------------------------------------


def test_runs_with_the_columns_have_more_plots_and_older_ones_stay(one, older, tmp_path):
    new = [path.name for path in write_plots([one], tmp_path / "new")]
    assert new == [*PLOT_NAMES, *PLOT_NAMES_OF_COLUMNS, "timeline.png"]
    old = [path.name for path in write_plots([older], tmp_path / "old")]
    assert old == [*PLOT_NAMES, "timeline.png"]
    both = {path.name: path for path in write_plots([one, older], tmp_path / "both")}
    assert both.keys() >= set(PLOT_NAMES_OF_COLUMNS)
    for name in PLOT_NAMES_OF_COLUMNS:
        height, width, _ = matplotlib.image.imread(both[name]).shape
        assert width == 1200 and 250 <= height <= 1000


def test_bars_are_shares_with_their_totals(one, older):
    axes = plots.time_by_phase([older, one]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["topk-s0"]
    widths = {bars.get_label(): bars[0].get_width() for bars in axes.containers}
    shares = {"train": 41.667, "encode": 8.333, "evaluate": 16.667, REST: 33.333}
    assert widths == pytest.approx(shares, abs=0.001)
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["0.625", "", "0.25", "0.5", "1.5 s"]
    axes = plots.bytes_by_part([one]).axes[0]
    assert [bars[0].get_width() for bars in axes.containers] == pytest.approx([20, 20, 60])
    assert axes.texts[-1].get_text() == "0.06 MB"


def test_residuals_stand_beside_densities(one):
    shares, owed = plots.residual_per_round([one]).axes
    assert len(shares.lines) == len(owed.lines) == 1
    assert owed.lines[0].get_ydata()[:2].tolist() == [1, 2]


def test_layers_of_one_run_are_bars_and_of_several_points(one, older, tmp_path):
    axes = plots.bytes_by_layer([one]).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [140, 16, 4, 8, 2]
    names = ["conv", "block.0.a", "block.0.b", "block.1.a", "scale"]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert axes.yaxis.get_inverted()  # the first layer on top
    columns = ({"bytes_by_tensor": {"other.weight": 5}, "bytes_by_part": {"header": 5}},)
    other = read_run(write_run(tmp_path, "other", columns=columns))
    first, second = plots.bytes_by_layer([one, older, other]).axes
    assert first.lines[0].get_xdata().tolist() == [140, 16, 4, 8, 2]
    assert second.lines[0].get_xdata().tolist() == [5]


def test_numbers_of_bytes_are_short():
    numbers = {0.5: "0.5 B", 999: "999 B", 999.6: "1 kB", 1234: "1.23 kB", 45_678_901: "45.7 MB"}
    assert {number: layers_plot.short(number) for number in numbers} == numbers
