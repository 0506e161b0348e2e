"""pipeline.py: jobs on threads end as jobs without them, in order, in memory of their own."""

import threading
import time

import pytest
import torch
from helpers.runs import make_federation, rounds, summary

from federation import client, federation
from federation.client import Clients
from federation.pipeline import Pipeline
from training.local_sgd import Interrupted

CPU = torch.device("cpu")


def job(number: int, log: list):
    """Writes its number on the memory that it gets; earlier jobs take longer."""

    def work(memory):
        log.append(("begins", number))
        payload = memory(1000)
        payload[:] = bytes([number]) * 1000
        time.sleep(0.002 * (7 - number % 8))
        log.append(("ends", number))
        return number, payload

    return work


def jobs(count: int, log: list):
    for number in range(count):
        log.append(("trains", number))
        yield job(number, log)


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_results_come_in_order_and_stay_valid_until_the_next(num_threads):
    log, pipeline = [], Pipeline(CPU, num_threads)
    for _ in range(2):
        for expected, (number, payload) in enumerate(pipeline.run(jobs(20, log))):
            assert number == expected and payload == bytes([number]) * 1000
            log.append(("read", number))
    assert [number for event, number in log if event == "read"] == [*range(20), *range(20)]
    assert all(len(memory.chunks) == 1 for memory in pipeline.memories)


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_no_more_jobs_wait_than_there_is_memory_for(num_threads):
    log, pipeline = [], Pipeline(CPU, num_threads)
    for number, _ in pipeline.run(jobs(20, log)):
        trained = max(n for event, n in log if event == "trains")
        assert trained - number <= num_threads


def test_what_is_kept_stays_valid_until_it_is_cleared():
    pipeline = Pipeline(CPU, 2)
    kept = list(pipeline.run(jobs(20, []), keep=True))
    assert all(payload == bytes([number]) * 1000 for number, payload in kept)
    used = [memory.used for memory in pipeline.memories]
    pipeline.clear()
    assert min(used) > 0 and [memory.used for memory in pipeline.memories] == [0, 0, 0]


def test_the_next_client_trains_while_the_last_one_is_encoded():
    """The first job ends only once the second client has been trained."""
    trained = threading.Event()

    def pair():
        yield lambda memory: trained.wait(10)
        trained.set()
        yield lambda memory: "second"

    assert list(Pipeline(CPU, 1).run(pair())) == [True, "second"]


@pytest.mark.parametrize("fails", ["training", "encoding"])
def test_jobs_that_are_under_way_end_before_a_failure_is_reported(fails):
    log = []

    def some():
        yield from jobs(2, log)
        if fails == "training":
            raise KeyError("training")
        yield lambda memory: {}["encoding"]
        yield from jobs(2, log)

    with pytest.raises(KeyError, match=fails):
        list(Pipeline(CPU, 3).run(some()))
    assert len([1 for event, _ in log if event == "begins"]) == len(
        [1 for event, _ in log if event == "ends"]
    )


WORDS = {
    "top-k": ["pruning.density=0.05", "uplink.values=int8", "uplink.error_feedback=true"],
    "dense": ["pruning.method=none", "uplink.values=fp32", "uplink.error_feedback=false"],
    "SCAFFOLD": ["local.algorithm=SCAFFOLD", "uplink.values=qsgd4"],
    "norms": ["model.name=resnet18", "model.width=0.0625", "model.norm_policy=local"],
    "dynamic": ["pruning.mask.method=dynamic", "pruning.mask.every=2"],
    "copies": ["downlink.budget=20x", "model.norm_policy=static", "uplink.error_feedback=true"],
    "copies in lanes": ["downlink.mode=copies", "downlink.values=eden2", "local.lanes=4"],
}


@pytest.mark.parametrize("case", WORDS)
def test_a_run_with_threads_is_the_run_without(run, monkeypatch, case):
    found = []
    for num_threads in (0, 3):
        for ends in (federation, client):
            monkeypatch.setattr(ends, "num_coding_threads", lambda _, n=num_threads: n)
        status, folder = run(
            *WORDS[case], "clients.total=6", "clients.per_round=6", name=f"t{num_threads}"
        )
        assert status == 0
        ledger = (folder / "ledger.csv").read_text()
        found.append(
            (summary(folder)["model_sha256"], ledger, [r["train_loss"] for r in rounds(folder)])
        )
    assert found[0] == found[1]


def test_threads_end_with_their_pipeline():
    pipeline = Pipeline(CPU, 2)
    assert list(pipeline.run(lambda _, n=n: n for n in range(4))) == [0, 1, 2, 3]
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("coding")]
    own = [thread for thread in threads if thread in pipeline.pool._threads]
    assert own
    del pipeline, threads
    for thread in own:
        thread.join(10)
    assert not any(thread.is_alive() for thread in own)


def test_after_an_interruption_nobody_is_received_any_more(tmp_path, monkeypatch):
    """The states that a client begins with are about to be thrown away, and others saved."""
    monkeypatch.setattr(client, "num_coding_threads", lambda _: 6)
    running, receive = [], Clients._receive

    def slowly(self, *task):
        running.append(1)
        time.sleep(0.05)
        received = receive(self, *task)
        running.pop()
        return received

    def interrupt(*_, **__):
        raise Interrupted

    one = make_federation(
        tmp_path, "downlink.mode=copies", "clients.total=8", "clients.per_round=8"
    )
    monkeypatch.setattr(Clients, "_receive", slowly)
    monkeypatch.setattr(client, "train_client", interrupt)
    discard, store = [], one.clients.store
    monkeypatch.setattr(store, "discard", lambda: discard.append(len(running)))
    with pytest.raises(Interrupted):
        one.run_round()
    assert discard == [0]
