"""bandwidth_analysis/runs.py."""

import csv

import numpy as np
import pytest
from helpers.run_folders import (
    LEDGER_COLUMNS,
    edit,
    message,
    write_run,
)

from bandwidth_analysis import AnalysisError, read_run
from bandwidth_analysis.runs import run_labels


@pytest.mark.parametrize(
    ("name", "num_bytes"), [("rounds.jsonl", 5), ("ledger.csv", 5), ("ledger.csv", 60)]
)
def test_a_kill_in_the_last_round_costs_that_round_only(tmp_path, name, num_bytes):
    path = write_run(tmp_path, finished=False) / name
    path.write_bytes(path.read_bytes()[:-num_bytes])
    run = read_run(path.parent)
    assert run.num_rounds == 2
    assert run.total("bytes_up") == 40_000
    assert run.traffic["dense_bytes_down"].tolist() == [8_000_000, 8_000_000]


def test_messages_of_a_round_still_going_do_not_count(tmp_path):
    folder = write_run(tmp_path, finished=False)
    with (folder / "ledger.csv").open("a", encoding="utf-8") as file:
        csv.DictWriter(file, LEDGER_COLUMNS).writerow(message(4, "up", 0))
    assert read_run(folder).total("bytes_up") == 60_000


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("summary.json", '"bytes_up": 60000', '"bytes_up": 60001', "bytes_up is 60001 in summary"),
        ("summary.json", '"rounds_completed": 3', '"rounds_completed": 4', "counts 4 rounds"),
        ("summary.json", '"wall_seconds": 5.0', '"wall_seconds": "5"', "'wall_seconds' has no"),
        ("summary.json", "}", "", "half-written"),
        ("ledger.csv", "update,10000", "update,10001", "bytes_up of round 1 is 20000 in"),
        ("ledger.csv", "update,10000", "update,1e4x", "ledger.csv: damaged"),
        ("ledger.csv", "update,10000", "update,-1", "negative"),
        ("ledger.csv", "1,up,0", "-1,up,0", "below 0"),
        ("ledger.csv", ",up,", ",side,", "neither up nor down"),
        ("ledger.csv", "dense_bytes", "dense", "ledger.csv: damaged"),
        ("rounds.jsonl", '{"round": 2', '{"round": 4', "rounds.jsonl:2: should be round 2"),
        ("rounds.jsonl", '{"round": 2', '"round": 2', "rounds.jsonl:2: damaged"),
        ("rounds.jsonl", '"bytes_up": 20000', '"bytes_up": null', "rounds.jsonl:1: 'bytes_up'"),
        ("rounds.jsonl", '"link_utilisation": 0.25', '"link_utilisation": "a"', "no usable value"),
        ("ledger.csv", "80.0,0.25", "80.0,-1", "ledger.csv: damaged (a time is no number)"),
        ("ledger.csv", "80.0,0.25", "80.0,x", "ledger.csv: damaged"),
        ("environment.json", "dataset", "data", "'dataset' has no usable value (found nothing)"),
        ("config.yaml", "seed: 0", "seed: [0", "config.yaml: damaged"),
    ],
)
def test_damage_is_refused_in_one_line(tmp_path, name, old, new, message):
    folder = write_run(tmp_path)
    edit(folder / name, old, new)
    with pytest.raises(AnalysisError) as caught:
        read_run(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["environment.json", "ledger.csv", "partition.npz"])
def test_missing_files_are_refused(tmp_path, name):
    folder = write_run(tmp_path)
    (folder / name).unlink()
    with pytest.raises(AnalysisError, match=f"{name}: cannot be read"):
        read_run(folder)


@pytest.mark.parametrize("name", ["rounds.jsonl", "ledger.csv", "partition.npz", "summary.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe\x00PK", b"PK\x03\x04", b"[]\n", b"[" * 99_999 + b"\n"],
    ids=["empty", "not text", "half a zip", "a list", "too deep"],
)
def test_overwritten_files_are_refused(tmp_path, name, content):
    folder = write_run(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(AnalysisError):
        read_run(folder)


def test_labels_are_short_and_never_ambiguous(tmp_path):
    folders = [
        write_run(tmp_path, "dense"),
        write_run(tmp_path / "monday", "topk"),
        write_run(tmp_path / "tuesday", "topk"),
        write_run(tmp_path, "topk", seed=1),
    ]
    labels = run_labels([read_run(folder) for folder in folders])
    assert labels == ["dense-s0", "monday/topk-s0", "tuesday/topk-s0", "topk-s1"]


@pytest.mark.parametrize("flag", [0x01, 0x20], ids=["encrypted", "patched"])
def test_a_partition_in_a_zip_of_another_kind_is_refused(tmp_path, flag):
    path = write_run(tmp_path) / "partition.npz"
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= flag
    path.write_bytes(content)
    with pytest.raises(AnalysisError, match="partition.npz: damaged"):
        read_run(path.parent)


@pytest.mark.parametrize("counts", [[[0.5, 1, 1]], [["1", "1", "1"]], [1, 1, 1], [[1, 1]]])
def test_a_partition_that_is_no_table_of_counts_is_refused(tmp_path, counts):
    path = write_run(tmp_path) / "partition.npz"
    np.savez(path, labels_per_client=np.array(counts), class_names=np.array(["a", "b", "c"]))
    with pytest.raises(AnalysisError, match="partition.npz: labels_per_client is"):
        read_run(path.parent)
