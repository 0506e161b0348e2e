"""bandwidth_analysis/plots.py, with numbers computed by hand."""

from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
from helpers.run_folders import FALLBACK, NOTE, PLOT_NAMES_OF_GROUPS, write_run
from matplotlib.figure import Figure
from matplotlib.text import Text

from bandwidth_analysis import comparison_table, drawing, palette, plots, read_run, write_plots
from bandwidth_analysis.pareto import on_front


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


@pytest.mark.parametrize("num_clients", [1, 1000])
def test_plots_are_pictures_of_sensible_size(tmp_path, num_clients):
    runs = [
        read_run(write_run(tmp_path, fallback=FALLBACK, num_clients=num_clients)),
        read_run(write_run(tmp_path, seed=1, finished=False, num_clients=num_clients)),
    ]
    paths = write_plots(runs, tmp_path / "new" / "plots")
    assert [path.name for path in paths] == PLOT_NAMES_OF_GROUPS
    assert sorted(paths[0].parent.iterdir()) == sorted(paths)  # no temporary file is left
    for path in paths:
        height, width, _ = matplotlib.image.imread(path).shape
        assert width == 1200
        assert 500 <= height <= 1500


def test_every_plot_and_the_table_carry_the_fallback_note(tmp_path):
    fallen = read_run(write_run(tmp_path, fallback=FALLBACK + ".\n"))
    other = read_run(write_run(tmp_path, "other"))
    for draw in (*plots.PLOTS.values(), *plots.PLOTS_OF_SEVERAL_RUNS.values()):
        assert NOTE in texts(draw([fallen]))
        assert f"topk-s0: {NOTE}" in texts(draw([fallen, other]))
        assert not any("CIFAR-10" in text for text in texts(draw([other])))
    assert comparison_table([fallen]).endswith("\n" + NOTE)
    assert "CIFAR-10" not in comparison_table([other])


def test_curves_hold_the_recorded_numbers(tmp_path):
    runs = [
        read_run(write_run(tmp_path)),
        read_run(write_run(tmp_path, "dense", bytes_up=4_000_000)),
    ]
    first, second = plots.accuracy_vs_rounds(runs).axes[0].lines
    assert first.get_xydata().tolist() == second.get_xydata().tolist() == [[1, 25], [3, 75]]

    dense, _, first, second = plots.accuracy_vs_megabytes(runs).axes[0].lines
    assert dense.get_xdata() == [48, 48]
    assert first.get_xydata() == pytest.approx(np.array([[4.02, 25], [12.06, 75]]))
    assert second.get_xydata() == pytest.approx(np.array([[12, 25], [36, 75]]))

    up, down = plots.bytes_per_round(runs).axes
    assert [line.get_ydata()[0] for line in up.lines] == [8e6, 8e6, 20_000, 8e6]
    assert [line.get_ydata()[0] for line in down.lines] == [8e6, 8e6, 4e6, 4e6]
    assert up.get_yscale() == "log"
    assert plots.accuracy_vs_megabytes(runs).axes[0].get_xscale() == "linear"


def test_volumes_far_apart_stand_on_a_logarithmic_axis(tmp_path):
    runs = [read_run(write_run(tmp_path)), read_run(write_run(tmp_path, "wide", bytes_up=10**9))]
    assert plots.accuracy_vs_megabytes(runs).axes[0].get_xscale() == "log"


def test_the_seeds_of_a_group_are_a_line_with_a_band(tmp_path):
    runs = [read_run(write_run(tmp_path)), read_run(write_run(tmp_path, seed=1, bytes_up=30_000))]
    runs[1] = replace(runs[1], accuracy=np.array([0.5, 0.5, 0.95]))
    with drawing.style():
        figure = plots.accuracy_vs_megabytes(runs)
    _, line = figure.axes[0].lines
    assert line.get_xydata() == pytest.approx(np.array([[4.04, 37.5], [12.12, 85]]))
    [band] = figure.axes[0].collections
    edges = {tuple(point) for point in band.get_paths()[0].vertices.round(2).tolist()}
    assert edges == {(4.04, 25), (4.04, 50), (12.12, 75), (12.12, 95)}
    assert "topk (2 runs)" in texts(figure)


def test_density_is_that_of_the_values_sent(tmp_path):
    shares, bits = plots.density_per_round([read_run(write_run(tmp_path))]).axes
    # Of two dense updates of a million values each, 2 x 2000 values travel in 2 x 10 kB.
    assert shares.lines[0].get_ydata() == pytest.approx([0.2] * 3)
    assert bits.lines[0].get_ydata() == pytest.approx([40] * 3)


def test_bars_add_up_to_bytes_and_rounds(tmp_path):
    def widths(axes):
        return [[round(bar.get_width(), 6) for bar in bars] for bars in axes.containers]

    run, other = read_run(write_run(tmp_path)), read_run(write_run(tmp_path, "dense"))
    busy = [row | {"device_utilisation": 0.5} for row in run.rows]
    [axes] = plots.time_of_a_round([replace(run, rows=busy), other]).axes
    assert widths(axes) == [[15, 0], [7.5, 7.5], [7.5, 0], [0, 22.5]]
    [axes] = plots.bytes_by_kind([run, other]).axes
    assert widths(axes) == [[0.06, 0.06], [12, 12]]


def test_the_front_is_what_nothing_beats(tmp_path):
    # The second costs more than the first for less, the fourth is as good as the third for more.
    assert on_front([1, 2, 3, 4, float("nan")], [0.5, 0.4, 0.8, 0.8, 0.9]) == [0, 2]
    assert on_front([1, 1], [0.5, 0.5]) == [0, 1]
    runs = [read_run(write_run(tmp_path, name)) for name in ("a", "b")]
    runs[1] = replace(runs[1], mean_accuracy=0.9, simulated_seconds=7200.0)
    by_bytes, by_time = plots.pareto_front(runs).axes
    assert by_bytes.lines[0].get_xydata().tolist() == [[12.06, 90]]
    assert by_time.lines[0].get_xydata().tolist() == [[62.05, 50], [120, 90]]


def test_no_two_points_of_the_front_look_alike(tmp_path):
    runs = [read_run(write_run(tmp_path, f"run{number}")) for number in range(20)]
    by_bytes, _ = plots.pareto_front(runs).axes
    points = [line for line in by_bytes.lines if line.get_marker() not in ("", "None", None)]
    looks = {(line.get_color(), line.get_marker(), line.get_fillstyle()) for line in points}
    assert len(looks) == len(points) == 20


def test_runs_of_one_partition_share_a_panel(tmp_path):
    runs = [read_run(write_run(tmp_path, name, seed)) for name in "ab" for seed in (0, 1)]
    titles = [axes.get_title() for axes in plots.labels_per_client(runs).axes]
    assert [title for title in titles if title] == [
        "Labels per client: a-s0, b-s0",
        "Labels per client: a-s1, b-s1",
    ]


def test_sample_pictures_stand_with_their_clients_labels(tmp_path):
    run = read_run(write_run(tmp_path, has_samples=True))
    other = read_run(write_run(tmp_path, "other"))
    with drawing.style():
        figure = plots.sample_pictures([other, run, replace(run, name="same")])
    [axes] = figure.axes
    assert axes.get_title() == "Pictures by client: topk-s0, same-s0"
    assert [text.get_text() for text in axes.texts] == ["dog (cat)", "dog", "ship"]
    assert axes.get_xlabel() == "Coloured: the client's label (and the server's)"
    assert [text.get_color() == palette.COLOURS[1] for text in axes.texts] == [True, False, False]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0\n(3)", "1\n(12)"]
    corners = np.array([image.get_extent() for image in axes.images])  # left, right, bottom, top
    assert np.allclose(corners.reshape(3, 2, 2).mean(axis=2), [(0, 0), (0, 1), (1, 1)])
    for image, picture in zip(axes.images, run.samples.images, strict=True):
        assert np.array_equal(image.get_array(), picture)


def test_a_run_without_samples_has_no_such_plot(tmp_path):
    without = read_run(write_run(tmp_path))
    assert plots.plots_of([without, without]) == plots.PLOTS | plots.PLOTS_OF_SEVERAL_RUNS
    assert [*plots.plots_of([without])] == [*plots.PLOTS, "timeline"]
    run = read_run(write_run(tmp_path, "diverse", has_samples=True))
    paths = write_plots([without, run], tmp_path / "plots")
    assert [path.name for path in paths] == [*PLOT_NAMES_OF_GROUPS, "sample_pictures.png"]
    assert matplotlib.image.imread(paths[-1]).shape[1] == 1200


# --- names that are hard to draw ------------------------------------------------------------------

HARD_NAMES = {
    "formula": ("_$x^$", "_$x^$"),
    "half a formula": (r"$\frac{", r"$\frac{"),
    "escaped dollar": (r"\$x^\$", r"\$x^\$"),
    "two lines": ("a\nb", r"a\nb"),
    "emoji": ("\U0001f408", r"\U0001f408"),
    "Chinese": ("\u732b", r"\u732b"),
    "accent": ("caf\xe9", "caf\xe9"),
    "half a character": ("\udcff", r"\udcff"),
    "terminal": ("\x1b[31m", r"\x1b[31m"),
    "no glyph": ("\x00\u202e", r"\x00\u202e"),
}


@pytest.mark.parametrize(("name", "drawn"), HARD_NAMES.values(), ids=HARD_NAMES)
def test_any_name_is_drawn_as_it_is_or_escaped(tmp_path, name, drawn, recwarn):
    run = replace(read_run(write_run(tmp_path)), name=name, model=name)
    assert drawing.render(plots.accuracy_vs_rounds, [run]).startswith(b"\x89PNG")
    with drawing.style():
        shown = texts(plots.accuracy_vs_rounds([run]))
    assert f"{drawn}-s0" in shown and f"Test accuracy: {drawn} on digits" in shown
    assert not recwarn.list


def test_any_class_name_is_drawn_as_it_is_or_escaped(tmp_path, recwarn):
    names, drawn = zip(*HARD_NAMES.values(), strict=True)
    counts = np.ones((2, len(names)), np.int64)
    run = replace(read_run(write_run(tmp_path)), class_names=list(names), labels_per_client=counts)
    assert drawing.render(plots.labels_per_client, [run]).startswith(b"\x89PNG")
    with drawing.style():
        assert set(drawn) <= set(texts(plots.labels_per_client([run])))
    assert not recwarn.list


@pytest.mark.parametrize("word", ["x", "a b ", "$"])
def test_long_names_are_cut_and_still_tell_classes_apart(tmp_path, word):
    names = [f"{number} {word * 5000}" for number in range(3)]
    run = read_run(write_run(tmp_path, fallback=word * 5000))
    run = replace(run, name=names[0], dataset=names[1], class_names=names)
    for path in write_plots([run], tmp_path / "plots"):
        assert matplotlib.image.imread(path).shape[0] < 2000
    with drawing.style():
        shown = texts(plots.labels_per_client([run]))
    for name in names:
        assert name[:13] + "..." in shown


def test_a_run_without_a_round_yet_says_so(tmp_path):
    run = read_run(write_run(tmp_path, accuracies=(), finished=False))
    assert len(write_plots([run], tmp_path / "plots")) == len(plots.PLOTS)
    assert "no round evaluated yet" in texts(plots.accuracy_vs_rounds([run]))
