"""bandwidth_analysis/table.py, with numbers computed by hand."""

from helpers.run_folders import edit, write_run

from bandwidth_analysis import Run, comparison_table, read_run


def cells(run: Run) -> list[str]:
    """The run's line of the table; columns stand at least two spaces apart."""
    line = comparison_table([run]).splitlines()[3]
    return [cell.strip() for cell in line.split("  ") if cell]


def test_table_of_a_finished_run(tmp_path):
    # 6 updates of 10 kB for 24 MB dense, 6 models of 2 MB for 24 MB dense.
    expected = "topk-s0|digits|resnet18|3|75.00|50.00 (k=2)|0.060|12.0|400x|2x|1 h 02 min|5.0 s"
    expected += "|1.0 s|25.00|-"
    assert cells(read_run(write_run(tmp_path))) == expected.split("|")


def test_table_of_an_unfinished_run_counts_ledger_and_rows(tmp_path):
    run = read_run(write_run(tmp_path, accuracies=(0.25, 0.5), finished=False))
    assert cells(run)[3:] == (
        "2/3 unfinished|50.00|37.50 (k=2)|0.040|8.000|400x|2x|1 min 00 s|3.0 s|1.0 s|25.00|-".split(
            "|"
        )
    )


def test_table_of_a_run_without_a_round_yet(tmp_path):
    folder = write_run(tmp_path, accuracies=(), finished=False)
    (folder / "rounds.jsonl").unlink()
    (folder / "ledger.csv").unlink()
    run = read_run(folder)
    assert cells(run)[3:] == "0/3 unfinished|-|- (k=0)|0.000|0.000|-|-|0.0 s|0.0 s|-|-|-".split("|")


def test_waiting_is_averaged_over_the_rounds_that_have_it(tmp_path):
    folder = write_run(tmp_path)
    edit(folder / "rounds.jsonl", '"waited_seconds": 1.0', '"waited_seconds": 3.5')
    edit(folder / "rounds.jsonl", '"link_utilisation": 0.25', '"link_utilisation": null')
    edit(folder / "rounds.jsonl", '"device_utilisation": null', '"device_utilisation": 0.5')
    assert cells(read_run(folder))[-3:] == ["1.8 s", "25.00", "50.00"]
