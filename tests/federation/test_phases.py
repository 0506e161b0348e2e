"""phases.py: what counts as which phase, and what rounds.jsonl says of it and of a client's update.

Ranks and resumed runs must write the same rows, but for times.
"""

import math
import threading
import time

import numpy as np
import pytest
import torch
from helpers.runs import (
    killed_before_logging,
    ledger,
    make_federation,
    note_what_is_owed,
    rounds,
    summary,
)

from federation.phases import PHASES, Phases, in_phases_of_this_thread, within
from federation.uplink import _norm

TIMES = ("phase_seconds", "wall_seconds")


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds) lets time pass, as the phases see it; each thread has all of it."""
    now = [0.0]

    def advance(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return advance


def taken(phases: Phases) -> dict[str, float]:
    return {phase: seconds for phase, seconds in phases.take().items() if seconds}


def test_a_phase_within_another_counts_once(clock):
    phases = Phases()
    with phases("encode"):
        clock(1)
        with within("select"):
            clock(2)
            with phases("encode"):
                clock(4)
        clock(8)
    assert taken(phases) == {"encode": 13, "select": 2}
    assert list(phases.take()) == list(PHASES) and not taken(phases)


def test_work_that_another_thread_takes_over_counts_where_it_came_from(clock):
    def work(seconds: float) -> float:
        with within("encode"):
            clock(seconds)
        return seconds

    phases, done = Phases(), []
    with phases("train"):
        taken_over = in_phases_of_this_thread(work)
        thread = threading.Thread(target=lambda: done.append(taken_over(3)))
        thread.start()
        thread.join()
    assert taken(phases)["encode"] == 3 and done == [3]
    assert in_phases_of_this_thread(work)(2) == 2 and not taken(phases)


def test_outside_of_any_phase_nothing_counts(clock):
    phases = Phases()
    with phases("step"):
        pass
    with within("select"):
        clock(1)
    assert not taken(phases)


def test_a_phase_that_fails_has_ended(clock):
    phases = Phases()
    with pytest.raises(ZeroDivisionError), phases("train"):
        clock(1)
        raise ZeroDivisionError
    with within("select"):
        clock(2)
    assert taken(phases) == {"train": 1}


def test_items_made_on_demand_count_when_they_are_made(clock):
    def items():
        for number in range(3):
            clock(1)
            yield number

    phases, met = Phases(), []
    for number in phases.each("train", items()):
        met.append(number)
        clock(10)
    assert met == [0, 1, 2] and taken(phases) == {"train": 3}


def test_threads_add_up_to_more_than_the_wall(clock):
    phases = Phases()

    def encodes():
        with within("select"):
            clock(1)  # this thread is in no phase yet
        with phases("encode"), within("select"):
            clock(2)

    with phases("train"):
        thread = threading.Thread(target=encodes)
        thread.start()
        thread.join()
    assert taken(phases) == {"train": 3, "select": 2}


# --- rows of rounds.jsonl -------------------------------------------------------------------------


def rows_without_times(folder) -> list[dict]:
    return [{key: row[key] for key in row.keys() - set(TIMES)} for row in rounds(folder)]


def updates_of(folder, round_number: int) -> list[int]:
    """The bytes of the updates of a round, in the order of the ledger."""
    rows = [row for row in ledger(folder) if int(row["round"]) == round_number]
    first = min(int(row["sender"]) for row in rows if row["direction"] == "up")
    mine = [row for row in rows if row["kind"] == "update" and row["sender"] == str(first)]
    return [int(row["bytes"]) for row in mine]


SCHEDULES = {
    "synchronous": [],
    "fedbuff": ["schedule.name=fedbuff", "schedule.buffer=2"],
    "hierarchical": ["schedule.name=hierarchical", "schedule.edges=2", "schedule.edge_rounds=2"],
    "gossip": ["schedule.name=gossip", "clients.per_round=4", "server.optimizer=FedAvg"],
    "semi_synchronous": ["schedule.name=semi_synchronous", "local.steps=null"],
    "carried": ["schedule.name=synchronous", "schedule.deadline_seconds=60", "schedule.late=carry"],
}


@pytest.mark.parametrize("words", SCHEDULES.values(), ids=SCHEDULES)
def test_phases_are_most_of_a_round_and_never_more(tmp_path, words):
    if "schedule.name=gossip" in words:
        words = [*words, "uplink.error_feedback=false", "schedule.gamma=0.5"]
    one = make_federation(tmp_path, "local.steps=20", *words)
    one.run_round()  # compiles
    for _ in range(2):
        row, _ = one.run_round()
        seconds, wall = row["phase_seconds"], row["wall_seconds"]
        assert list(seconds) == list(PHASES) and min(seconds.values()) >= 0
        assert 0.5 * wall < sum(seconds.values()) <= wall
        assert all(seconds[phase] for phase in ("train", "select", "encode", "decode", "evaluate"))
        assert sum(row["bytes_by_part"].values()) > 0 and row["bytes_by_tensor"]


def test_an_evaluated_round_describes_the_update_of_its_first_client(run):
    _, folder = run("evaluation.every=2", "rounds=3", "model.name=resnet18", "model.width=0.125")
    first, second, third = rounds(folder)
    assert first["bytes_by_part"] == first["bytes_by_tensor"] == {}
    for row in (second, third):
        [size] = updates_of(folder, row["round"])
        assert sum(row["bytes_by_part"].values()) == size
        body = size - row["bytes_by_part"]["header"]
        assert body <= sum(row["bytes_by_tensor"].values()) < 1.7 * body
        assert len(row["bytes_by_tensor"]) == 62


def test_the_residual_norm_is_the_root_mean_square_of_what_the_clients_owe(tmp_path, monkeypatch):
    one = make_federation(tmp_path)
    owed = note_what_is_owed(one, monkeypatch)
    for _ in range(2):
        owed.clear()
        row, _ = one.run_round()
        kept = [one.clients.store.get(client)["residual"].numpy() for client in owed]
        squares = [np.square(vector, dtype=np.float64).sum() for vector in kept]
        assert len(squares) == 3
        assert row["residual_norm"] == pytest.approx(math.sqrt(sum(squares) / 3), rel=1e-5)


def test_the_norm_of_a_long_vector_is_right_to_five_digits():
    vector = torch.randn(5_000_001, generator=torch.Generator().manual_seed(0))
    expected = np.linalg.norm(vector.double().numpy())
    assert _norm(vector) == pytest.approx(expected, rel=1e-5)


def test_without_error_feedback_nobody_owes(tmp_path):
    row, _ = make_federation(tmp_path, "uplink.error_feedback=false").run_round()
    assert row["residual_norm"] is None


def test_a_resumed_run_writes_the_same_rows(run, monkeypatch):
    _, whole = run(name="whole")
    killed = killed_before_logging(run, monkeypatch, 4)
    assert rows_without_times(killed) == rows_without_times(whole)
    assert summary(killed)["model_sha256"] == summary(whole)["model_sha256"]
