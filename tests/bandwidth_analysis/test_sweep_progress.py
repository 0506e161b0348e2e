"""bandwidth_analysis/sweep_progress.py: how far runs are, as their files say it."""

from concurrent.futures import Future
from pathlib import Path

from helpers.run_folders import write_run

from bandwidth_analysis.sweep_progress import Progress, table


def make_progress(folder: Path, job: Future | None) -> Progress:
    return Progress(folder.name, folder, folder.parent / f"{folder.name}.log", 3, job)


def test_a_run_waits_trains_and_ends(tmp_path):
    job = Future()
    run = make_progress(tmp_path / "topk-s0", job)
    assert not run.update() and run.line() == "waiting       0/3               topk-s0"
    run.log.touch()
    assert run.update() and run.state == "running" and not run.update()
    write_run(tmp_path)
    with (run.folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 4, "test_acc')  # being written
    assert not run.update() and run.line() == "running       3/3       75.00%  topk-s0"
    job.set_result(0)
    assert run.update() and run.state == "finished" and not run.update()


def test_a_run_that_was_finished_before_is_read_once(tmp_path):
    run = make_progress(write_run(tmp_path), None)
    assert run.update() and run.line() == "finished      3/3       75.00%  topk-s0"


def test_a_table_that_is_too_high_leaves_out_who_waits_and_who_is_done(tmp_path):
    runs = [make_progress(tmp_path / f"run{place}", None) for place in range(9)]
    for run, state in zip(runs, ["finished"] * 5 + ["running", "failed"], strict=False):
        run.state = state
    heading = "9 runs: 5 finished, 1 running, 2 waiting, 1 failed"
    assert table(runs, height=20) == [heading, *(run.line() for run in runs)]
    assert table(runs, height=9) == [heading, runs[5].line(), runs[6].line()]
