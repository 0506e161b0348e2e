"""bandwidth_analysis/timeline.py, on ledgers whose times are easy to follow."""

from pathlib import Path

from helpers.run_folders import edit, write_run

from bandwidth_analysis import read_run
from bandwidth_analysis.timeline import Segment, read_timeline


def write_ledger(folder: Path, *messages: str) -> Path:
    """messages: words such as `2 down 7 10 3`: round, direction, client, start and seconds."""
    lines = ["start,round,seconds,sender,kind,receiver,direction"]
    for message in messages:
        number, direction, client, start, seconds = message.split()
        ends = (client, "server") if direction == "up" else ("server", client)
        lines.append(f"{start},{number},{seconds},{ends[0]},x,{ends[1]},{direction}")
    path = folder / "ledger.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def states(segments: list[Segment]) -> list[tuple]:
    return [(segment.state, segment.start, segment.end) for segment in segments]


def test_a_client_computes_between_what_it_receives_and_what_it_sends(tmp_path):
    messages = ["2 down 7 10 1", "2 down 7 11 1", "2 up 7 15 1", "2 up 7 16 2"]
    path = write_ledger(tmp_path, "1 down 7 0 9", *messages, "3 up 7 20 1")
    timeline = read_timeline(path, 2, 10.0, 10.0, [])
    assert (timeline.round_number, timeline.seconds) == (2, 10)
    assert states(timeline.clients["7"]) == [
        ("download", 0, 1),
        ("download", 1, 2),
        ("compute", 2, 5),
        ("upload", 5, 6),
        ("upload", 6, 8),
        ("idle", 8, 10),
    ]


def test_who_is_done_first_comes_first(tmp_path):
    ends = {"10": 6.0, "9": 3.0, "2": 6.0 + 1e-12}
    messages = [f"1 up {client} {end - 1} 1" for client, end in ends.items()]
    timeline = read_timeline(write_ledger(tmp_path, *messages), 1, 0.0, 8.0, [])
    assert list(timeline.clients) == ["9", "2", "10"]


def test_what_late_clients_did_last_is_lost(tmp_path):
    messages = ["1 down 0 0 2", "1 up 0 5 5", "1 down 1 0 2", "1 down 2 0 10", "1 up 3 5 1"]
    path = write_ledger(tmp_path, *messages)
    clients = read_timeline(path, 1, 0.0, 10.0, ["0", "1", "2"]).clients
    lost = {client: states([s for s in chain if s.is_lost]) for client, chain in clients.items()}
    assert lost["0"] == [("upload", 5, 10)]
    assert lost["1"] == [("unknown", 2, 10)]  # it computed until the end, or left before
    assert lost["2"] == [("download", 0, 10)]
    assert lost["3"] == []


def test_work_that_reaches_over_the_ends_of_a_round_is_cut_there(tmp_path):
    path = write_ledger(tmp_path, "2 up 0 13 1", "2 down 1 9 3")
    clients = read_timeline(path, 2, 10.0, 10.0, []).clients
    assert states(clients["0"]) == [("compute", 0, 3), ("upload", 3, 4), ("idle", 4, 10)]
    assert states(clients["1"]) == [("download", 0, 2), ("compute", 2, 10)]


def test_what_comes_before_the_first_round_belongs_to_it(tmp_path):
    path = write_ledger(tmp_path, "0 down 4 2 1", "0 up 4 4 1", "1 down 4 5 1", "1 up 4 8 1")
    segments = read_timeline(path, 1, 0.0, 9.0, []).clients["4"]
    assert states(segments) == [
        ("idle", 0, 2),
        ("download", 2, 3),
        ("compute", 3, 4),
        ("upload", 4, 5),
        ("download", 5, 6),
        ("compute", 6, 8),
        ("upload", 8, 9),
    ]


def test_a_run_has_the_timeline_of_its_last_round_or_of_another(tmp_path):
    folder = write_run(tmp_path)
    edit(folder / "rounds.jsonl", '{"round": 3', '{"late": [1], "round": 3')
    last, second = read_run(folder).timeline, read_run(folder, 2).timeline
    assert (last.round_number, second.round_number) == (3, 2)
    assert states(last.clients["0"]) == states(second.clients["0"])
    assert states(second.clients["0"])[1:3] == [("compute", 0.25, 20), ("upload", 20, 20.25)]
    assert [s.state for s in last.clients["1"] if s.is_lost] == ["upload"]
    assert not any(s.is_lost for s in second.clients["1"])


def test_there_is_no_timeline_before_the_first_round(tmp_path):
    assert read_run(write_run(tmp_path, accuracies=(), finished=False)).timeline is None
