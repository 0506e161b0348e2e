"""groups.py and records.py, with numbers computed by hand."""

import json
import math

import pytest
from helpers.run_folders import edit, write_run

from bandwidth_analysis import read_run
from bandwidth_analysis.groups import Spread, group_runs
from bandwidth_analysis.records import make_records, round_of_target


def test_a_spread_of_three_and_of_one():
    spread = Spread((1.0, 2.0, 6.0))
    assert (spread.mean, spread.low, spread.high) == (3, 1, 6)
    assert spread.sd == pytest.approx(math.sqrt(7))  # (4 + 1 + 9) / 2
    assert math.isnan(Spread((1.0,)).sd) and math.isnan(Spread(()).mean)
    assert spread.overlaps(Spread((0.5, 1.0))) and not spread.overlaps(Spread((6.5, 8.0)))


def test_runs_that_differ_in_their_seed_only_are_a_group(tmp_path):
    folders = [
        write_run(tmp_path, "a", 0),
        write_run(tmp_path, "b", 0),
        write_run(tmp_path, "a", 1),
    ]
    folders.append(write_run(tmp_path, "a", 2, finished=False))
    folders.append(write_run(tmp_path, "a", 3))
    edit(folders[-1] / "config.yaml", "resnet18", "resnet50")
    groups = group_runs([read_run(folder) for folder in folders])
    assert [(g.label, [run.seed for run in g.runs], g.finished) for g in groups] == [
        ("a-s0, a-s1", [0, 1], True),
        ("b", [0], True),
        ("a-s2", [2], False),
        ("a-s3", [3], True),
    ]


def test_the_record_of_two_seeds(tmp_path):
    runs = [read_run(write_run(tmp_path, seed=seed)) for seed in (0, 1)]
    edit(runs[1].folder / "summary.json", '"test_accuracy_mean": 0.5', '"test_accuracy_mean": 0.7')
    edit(runs[1].folder / "summary.json", "3723.0", "3725.0")
    [record] = make_records(group_runs([runs[0], read_run(runs[1].folder)]))
    assert record.mean_accuracy.values == (0.5, 0.7) and record.accuracy.values == (0.75, 0.75)
    assert (record.mb_up.mean, record.mb_down.mean) == (pytest.approx(0.06), 12)
    assert (record.ratio_up, record.ratio_down) == (pytest.approx(400), 2)
    assert record.ratio == pytest.approx(48 / 12.06)
    assert (record.simulated_seconds.mean, record.target, record.comparison) == (3724, None, None)
    # Rounds of 30 s, and rounds 2 and 3 of each run count; links are busy for a quarter of them.
    assert record.step.values == (30,) * 4 and record.communication.values == (7.5,) * 4
    assert record.computation.values == ()


def test_the_first_round_is_left_out_of_the_times_of_a_round(tmp_path):
    folder = write_run(tmp_path, finished=False)
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"device_utilisation": 0.5} for line in lines]
    for row, seconds in zip(rows, (100.0, 10.0, 20.0), strict=True):
        row["simulated_seconds"] = seconds
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [record] = make_records(group_runs([read_run(folder)]))
    assert record.step.values == (10, 20) and record.computation.values == (5, 10)


def test_a_target_is_reached_by_a_mean_over_five_evaluations(tmp_path):
    accuracies = (0.1, None, 0.7, 0.4, 0.6, 0.6, 0.6, 0.6, 0.9)
    run = read_run(write_run(tmp_path, accuracies=accuracies, finished=False))
    # Means: 0.1, 0.4, 0.4, 0.45, 0.48, then of five 0.58, 0.56, 0.66.
    assert [round_of_target(run, t) for t in (0.1, 0.4, 0.45, 0.57, 0.6, 0.67)] == [
        *(0, 2, 4, 6, 8, None),
    ]


def test_the_cost_of_a_target_counts_if_all_runs_reached_it(tmp_path):
    runs = [
        read_run(write_run(tmp_path, seed=0)),  # reaches 0.5 in round 3
        read_run(write_run(tmp_path, seed=1, accuracies=(0.5, 0.6, 0.7))),  # in round 1
    ]
    [record] = make_records(group_runs(runs), target=0.5)
    assert record.target.num_reached == 2
    assert record.target.seconds.values == (90, 30)
    assert record.target.mb_up.values == pytest.approx((0.06, 0.02))
    assert record.target.mb_down.values == (12, 4)
    [record] = make_records(group_runs(runs), target=0.55)
    assert record.target.num_reached == 1 and record.target.seconds.values == ()


def test_a_comparison_with_the_baseline(tmp_path):
    def group(name: str, accuracies: tuple, **more) -> list:
        folders = [write_run(tmp_path, name, seed, **more) for seed in range(len(accuracies))]
        for folder, accuracy in zip(folders, accuracies, strict=True):
            new = f'"test_accuracy_mean": {accuracy}'
            edit(folder / "summary.json", '"test_accuracy_mean": 0.5', new)
        return [read_run(folder) for folder in folders]

    runs = [*group("dense", (0.5, 0.54), bytes_up=4_000_000), *group("close", (0.53, 0.57))]
    runs += [*group("apart", (0.6, 0.7)), *group("alone", (0.9,))]
    groups = group_runs(runs)
    dense, *others = make_records(groups, baseline=groups[0])
    assert dense.comparison is None
    close, apart, alone = (record.comparison for record in others)
    assert close.points == pytest.approx(3) and apart.points == pytest.approx(13)
    assert close.fewer_bytes == pytest.approx((24 + 12) / (0.06 + 12))
    assert close.less_time == 1 and math.isnan(close.less_time_to_target)
    assert [c.verdict for c in (close, apart, alone)] == [
        *("ranges overlap (2 seeds)", "ranges apart (2 seeds)", "one seed: may be chance"),
    ]


def test_runs_of_another_data_set_and_unfinished_ones_are_not_compared(tmp_path):
    folders = [write_run(tmp_path, name) for name in ("a", "b")]
    folders.append(write_run(tmp_path, "c", finished=False))
    edit(folders[1] / "environment.json", '"digits"', '"cifar10"')
    groups = group_runs([read_run(folder) for folder in folders])
    _, other, unfinished = make_records(groups, baseline=groups[0])
    assert other.comparison.verdict == "other data set: not compared"
    assert unfinished.comparison.verdict == "unfinished: not compared"
    assert math.isnan(other.comparison.points) and math.isnan(unfinished.comparison.fewer_bytes)
    assert math.isnan(unfinished.final_accuracy) and other.final_accuracy == 0.5
