"""bandwidth_analysis/group_table.py: the four formats, read back."""

import csv
import io

from helpers.run_folders import FALLBACK, edit, write_run

from bandwidth_analysis import read_run
from bandwidth_analysis.group_table import format_table
from bandwidth_analysis.groups import group_runs
from bandwidth_analysis.records import Record, make_records


def two_groups(folder, target=None) -> list[Record]:
    """A baseline of two seeds, and a run that sends a tenth up."""
    runs = [read_run(write_run(folder, "base_line", seed, bytes_up=100_000)) for seed in (0, 1)]
    runs.append(read_run(write_run(folder, "topk")))
    groups = group_runs(runs)
    return make_records(groups, target, groups[0])


def cells(line: str, separator: str) -> list[str]:
    return [cell.strip() for cell in line.split(separator) if cell.strip()]


EXPECTED = [
    *("topk", "digits", "resnet18", "1", "3", "75.00", "50.00", "0.060", "12.0", "400x", "2x"),
    *("3.98x", "1 h 02 min", "-", "7.5 [7.5, 7.5]", "30 [30, 30]", "1 min 30 s", "0.060", "12.0"),
    *("+0.00", "1.04x less", "1x less", "1x less", "one seed: may be chance"),
]


def test_text_markdown_and_latex_have_the_same_cells(tmp_path):
    records = two_groups(tmp_path, target=0.5)
    text = format_table(records, "text").splitlines()
    assert cells(text[4], "  ") == EXPECTED
    assert "50.00 ± 0.00" in text[3] and text[0].count("to 50 %") == 3
    assert "One seed only, so that a difference may be chance: topk." in text
    markdown = format_table(records, "markdown").splitlines()
    assert cells(markdown[3], "|") == EXPECTED
    assert len({line.count("|") for line in markdown[:4]}) == 1
    latex = format_table(records, "latex").splitlines()
    assert cells(latex[5].removesuffix(r"\\"), "&") == EXPECTED
    assert r"base\_line & digits" in latex[4] and r"50.00 $\pm$ 0.00" in latex[4]


def test_csv_has_the_numbers(tmp_path):
    rows = list(csv.DictReader(io.StringIO(format_table(two_groups(tmp_path, 0.5), "csv"))))
    base, topk = rows
    assert (base["run"], base["num_seeds"], base["mean_accuracy_sd"]) == ("base_line", "2", "0")
    assert (topk["mean_accuracy_mean"], topk["mean_accuracy_sd"]) == ("0.5", "")
    assert (topk["mb_up_mean"], topk["ratio_up"], topk["step_seconds_max"]) == ("0.06", "400", "30")
    assert (topk["target"], topk["seconds_to_target_mean"]) == ("0.5", "90")
    assert base["baseline_points"] == "" and topk["baseline_points"] == "0"


def test_a_target_that_is_not_reached_is_said(tmp_path):
    line = format_table(two_groups(tmp_path, target=0.9), "text").splitlines()[4]
    assert cells(line, "  ")[16:19] == ["never", "-", "-"]


def test_unfinished_runs_other_data_and_fallbacks_are_said(tmp_path):
    folders = [write_run(tmp_path, "a"), write_run(tmp_path, "b", finished=False)]
    folders.append(write_run(tmp_path, "c", fallback=FALLBACK))
    edit(folders[0] / "environment.json", '"digits"', '"cifar10"')
    records = make_records(group_runs([read_run(folder) for folder in folders]))
    text = format_table(records, "text")
    assert "3/3" in text and "Unfinished, counted as far as it is: b." in text
    assert (
        "Accuracies on different data sets do not compare. CIFAR-10: a; "
        "scikit-learn's digits: b, c." in text
    )
    assert f"c-s0: {FALLBACK}; these are scikit-learn's digits" in text
