"""client_store.py: states within a budget of memory, whole after a kill at any place."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.runs import PYTHON, REPOSITORY, launch, make_federation, summary, tiny_command
from hypothesis import given, settings
from hypothesis import strategies as st

from federation import client_store
from federation.client_store import ClientStore, remove_old_states, write_tensors

ENTRIES = 8  # of a state: 32 bytes
PLENTY = 1e9


def state(value: float) -> dict[str, torch.Tensor]:
    return {"residual": torch.full((ENTRIES,), value)}


def value_of(store: ClientStore, client: int) -> float | None:
    found = store.get(client)
    return float(found["residual"][0]) if found else None


def put(store: ClientStore, round: int, **values: float) -> None:
    """A round in which clients c1, c2, ... get new states."""
    for name, value in values.items():
        store.stage(int(name[1:]), state(value), round)
    store.commit()


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# --- a round happens or it does not ---------------------------------------------------------------


@pytest.mark.parametrize("budget", [PLENTY, 40, 1], ids=["all fit", "one fits", "none fits"])
def test_staged_states_take_effect_with_commit(tmp_path, budget):
    store = ClientStore(tmp_path, budget)
    assert store.get(7) == {}
    store.stage(7, state(1.0), 1)
    assert value_of(store, 7) is None
    store.commit()
    assert value_of(store, 7) == 1.0
    store.stage(7, state(2.0), 2)
    store.stage(8, state(3.0), 2)
    assert float(store.get_staged(7)["residual"][0]) == 2.0 and value_of(store, 7) == 1.0
    store.discard()
    store.commit()
    assert value_of(store, 7) == 1.0 and value_of(store, 8) is None
    assert len(files(tmp_path)) <= 1  # what was discarded is off the disk


@pytest.mark.parametrize("budget", [PLENTY, 40, 1], ids=["all fit", "one fits", "none fits"])
def test_parts_of_a_round_are_seen_and_undone_together(tmp_path, budget):
    store = ClientStore(tmp_path, budget)
    put(store, 1, c7=1.0)
    store.save()
    for part in (2, 3):
        store.stage(7, state(float(part)), part)
        store.stage(8, state(10.0 * part), part)
        assert value_of(store, 7) == part - 1
        store.advance()
        assert value_of(store, 7) == part and value_of(store, 8) == 10 * part
    store.stage(7, state(4.0), 4)
    store.discard()
    assert value_of(store, 7) == 1.0 and value_of(store, 8) is None
    assert files(tmp_path) == ["7-1.pt"]
    for part in (2, 3):
        store.stage(7, state(float(part)), part)
        store.advance()
    store.commit()
    assert value_of(store, 7) == 3.0 and store.save() == {7: 3}
    store.drop_replaced()
    assert files(tmp_path) == ["7-3.pt"]


@pytest.mark.parametrize("budget", [PLENTY, 1])
def test_a_state_staged_again_gives_way(tmp_path, budget):
    store = ClientStore(tmp_path, budget)
    store.stage(1, state(1.0), 1)
    again = store.get_staged(1)  # with budget 1 a map of the file that is about to be replaced
    again["residual"].add_(1.0)
    store.stage(1, again, 1)
    store.commit()
    assert value_of(store, 1) == 2.0
    store.save()
    assert torch.equal(ClientStore(tmp_path, 1, {1: 1}).get(1)["residual"], torch.full((8,), 2.0))


def test_only_what_is_valid_is_saved(tmp_path):
    store = ClientStore(tmp_path / "clients", PLENTY)
    store.stage(1, state(1.0), 1)
    store.discard()
    store.stage(2, state(2.0), 2)
    assert store.save() == {} and files(tmp_path / "clients") == []
    store.commit()
    assert store.save() == {2: 2} and files(tmp_path / "clients") == ["2-2.pt"]


# --- copy-on-write --------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [PLENTY, 40, 1], ids=["all fit", "one fits", "none fits"])
def test_a_checkpoint_costs_what_changed_and_spares_the_one_before(tmp_path, budget):
    store = ClientStore(tmp_path, budget)
    put(store, 3, c1=1.0, c2=2.0)
    put(store, 4, c2=3.0)
    assert store.save() == {1: 3, 2: 4}
    assert files(tmp_path) == ["1-3.pt", "2-4.pt"]
    put(store, 5, c2=20.0)
    put(store, 6, c2=30.0)
    assert value_of(store, 2) == 30.0  # not what a file says
    assert store.save() == {2: 6}
    assert files(tmp_path) == ["1-3.pt", "2-4.pt", "2-6.pt"]
    before = ClientStore(tmp_path, budget, {1: 3, 2: 4})  # killed before the checkpoint stood
    assert (value_of(before, 1), value_of(before, 2)) == (1.0, 3.0)
    store.drop_replaced()
    assert files(tmp_path) == ["1-3.pt", "2-6.pt"]
    assert store.save() == {}


def test_states_survive_a_new_store(tmp_path):
    store = ClientStore(tmp_path, PLENTY)
    exact = {"residual": torch.randn(100), "steps": torch.tensor(3), "control": torch.randn(3, 2)}
    store.stage(12, exact, 3)
    store.commit()
    versions = store.save()
    other = ClientStore(tmp_path, PLENTY, versions)
    assert other.get(11) == {}
    found = other.get(12)
    assert found.keys() == exact.keys() and all(torch.equal(found[k], exact[k]) for k in exact)
    found["residual"].zero_()  # a private map: the file stays as it is
    assert torch.equal(other.get(12)["residual"], exact["residual"])
    put(other, 10, c12=5.0)
    assert other.save() == {12: 10} and versions == {12: 3}


def test_files_of_others_are_left_alone(tmp_path):
    for name in ("1-2.pt", "1-3.pt", "notes.txt"):
        (tmp_path / name).write_text("")
    remove_old_states(tmp_path, {1: 3})
    assert files(tmp_path) == ["1-3.pt", "notes.txt"]
    remove_old_states(tmp_path / "nowhere", {})


# --- the budget -----------------------------------------------------------------------------------


def test_the_least_recently_used_goes_to_the_disk(tmp_path):
    store = ClientStore(tmp_path, budget=3 * 32)
    put(store, 1, c1=1.0, c2=2.0, c3=3.0)
    assert files(tmp_path) == [] and store.on_host.num_bytes == 96
    store.get(1)
    put(store, 2, c4=4.0)
    assert files(tmp_path) == ["2-1.pt"] and store.on_host.num_bytes == 96
    assert [value_of(store, client) for client in (1, 2, 3, 4)] == [1.0, 2.0, 3.0, 4.0]
    put(store, 3, c2=5.0)  # no checkpoint names the file of client 2
    assert "2-1.pt" not in files(tmp_path)


def test_room_is_made_for_a_state_to_come(tmp_path):
    store = ClientStore(tmp_path, budget=3 * 32)
    store.make_room(1000)  # there is nothing to put on the disk
    put(store, 1, c1=1.0, c2=2.0, c3=3.0)
    store.get(1)
    store.make_room(32)
    assert files(tmp_path) == ["2-1.pt"] and store.on_host.num_bytes == 64
    store.make_room(32)
    assert store.on_host.num_bytes == 64
    store.make_room(1000)
    assert len(files(tmp_path)) == 3 and store.on_host.num_bytes == 0
    assert [value_of(store, client) for client in (1, 2, 3)] == [1.0, 2.0, 3.0]


def test_what_a_gpu_has_no_room_for_goes_to_the_host_and_then_to_the_disk(tmp_path):
    store = ClientStore(tmp_path, budget=2 * 32, has_gpu=True)
    for client in (1, 2, 3, 4, 5):
        store.stage(client, state(float(client)), 1)
    assert list(store.on_gpu.states) == [(4, 1), (5, 1)]
    assert list(store.on_host.states) == [(2, 1), (3, 1)] and files(tmp_path) == ["1-1.pt"]
    store.commit()
    assert store.save() == {client: 1 for client in range(1, 6)}
    assert len(files(tmp_path)) == 5 and not store.on_host.states
    assert list(store.on_gpu.states) == [(4, 1), (5, 1)]  # there it need not be copied again
    store.stage(1, state(6.0), 2)
    assert not store.on_host.states and files(tmp_path) == [f"{c}-1.pt" for c in range(1, 6)]
    store.commit()
    assert [value_of(store, client) for client in range(1, 6)] == [6.0, 2.0, 3.0, 4.0, 5.0]


def test_a_view_counts_with_its_whole_storage(tmp_path):
    store = ClientStore(tmp_path, budget=100)
    store.stage(1, {"residual": torch.zeros(1000)[:3]}, 1)
    assert store.on_host.num_bytes == 0 and files(tmp_path) == ["1-1.pt"]


@pytest.mark.parametrize("budget", [PLENTY, 40, 1], ids=["all fit", "one fits", "none fits"])
def test_threads_may_stage_and_read_at_once(tmp_path, budget, many_switches):
    store = ClientStore(tmp_path, budget)
    put(store, 1, **{f"c{client}": float(client) for client in range(4)})

    def work(client: int) -> None:
        for turn in range(20):
            store.make_room(32)
            assert value_of(store, client) == client
            store.stage(client, state(100.0 * turn + client), 2)
            assert float(store.get_staged(client)["residual"][0]) == 100.0 * turn + client

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert store.on_host.num_bytes == sum(
        kept["residual"].nbytes for kept in store.on_host.states.values()
    )
    assert store.on_host.num_bytes <= budget
    store.commit()
    assert [value_of(store, client) for client in range(4)] == [1900.0, 1901.0, 1902.0, 1903.0]


# --- weights that leave the mask ------------------------------------------------------------------


def test_nothing_is_owed_of_weights_that_a_newer_mask_lacks(tmp_path):
    store, owed = ClientStore(tmp_path, PLENTY), ("residual", "velocity")
    names = {"norm": torch.ones(2), "algorithm": torch.arange(1.0, 5.0)}
    store.stage(1, {name: torch.arange(1.0, 5.0) for name in owed} | names, 1)
    store.commit()
    store.use_mask(torch.tensor([True, False, True, False]), 2)
    found = store.get(1)
    assert store.is_older_than_mask(1) and not store.is_older_than_mask(2)
    assert all(found[name].tolist() == [0.0, 2.0, 0.0, 4.0] for name in owed)
    assert all(torch.equal(found[name], kept) for name, kept in names.items())
    kept = store.on_host.states[1, 1]["residual"]
    assert kept.tolist() == [1.0, 2.0, 3.0, 4.0]  # never written to
    store.stage(1, {"residual": torch.arange(1.0, 5.0)}, 2)
    store.commit()
    assert not store.is_older_than_mask(1)
    assert store.get(1)["residual"].tolist() == [1.0, 2.0, 3.0, 4.0]


# --- any history ----------------------------------------------------------------------------------

# A round: {client: value}, and what happens to it.
ROUNDS = st.lists(
    st.tuples(
        st.dictionaries(st.integers(0, 5), st.floats(-9, 9, width=32), max_size=6),
        st.sampled_from(["commit", "discard", "checkpoint", "kill"]),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(rounds=ROUNDS, num_fit=st.integers(0, 7), has_gpu=st.booleans())
def test_any_history_gives_what_a_plain_dict_gives(tmp_path_factory, rounds, num_fit, has_gpu):
    folder, budget = tmp_path_factory.mktemp("store"), num_fit * 32 + 1
    store = ClientStore(folder, budget, has_gpu=has_gpu)
    now: dict[int, float] = {}  # what the store should hold
    checkpoint: tuple[dict[int, int], dict[int, float]] = ({}, {})  # its versions, its values
    for number, (values, then) in enumerate(rounds, 1):
        for client, value in values.items():
            store.stage(client, state(value), number)
            for shelf in (store.on_gpu, store.on_host):
                held = sum(kept["residual"].nbytes for kept in shelf.states.values())
                assert held == shelf.num_bytes <= shelf.budget
        if then in ("commit", "checkpoint"):
            store.commit()
            now |= values
        if then == "discard":
            store.discard()
        if then == "checkpoint":
            checkpoint = (checkpoint[0] | store.save(), dict(now))
            store.drop_replaced()
            assert files(folder) == sorted(f"{c}-{v}.pt" for c, v in checkpoint[0].items())
            assert store.on_host.num_bytes == 0
        if then == "kill":
            remove_old_states(folder, checkpoint[0])
            store = ClientStore(folder, budget, checkpoint[0], has_gpu)
            now = dict(checkpoint[1])
        assert {client: value_of(store, client) for client in now} == now


# --- kills and full disks -------------------------------------------------------------------------


class Killed(BaseException):
    """Ends what is going on on the spot."""


def kill_at(monkeypatch, last: int) -> None:
    """Break the `last`-th operation on the disk, leaving half a file where it wrote one."""
    calls = 0

    def breaking(original: Callable) -> Callable:
        def wrapper(path, *args):
            nonlocal calls
            calls += 1
            if calls == last:
                if original is write_tensors:
                    path.write_bytes(b"half")
                raise Killed
            return original(path, *args)

        return wrapper

    for target in (
        "federation.client_store.write_tensors",
        "federation.client_store.sync",
        "pathlib.Path.unlink",
    ):
        module, _, name = target.rpartition(".")
        owner = client_store if module.endswith("client_store") else Path
        monkeypatch.setattr(target, breaking(getattr(owner, name)))


@pytest.mark.parametrize("budget", [PLENTY, 40, 1], ids=["all fit", "one fits", "none fits"])
@pytest.mark.parametrize("last", range(1, 30, 2))
def test_a_kill_at_any_operation_leaves_a_whole_checkpoint(tmp_path, monkeypatch, budget, last):
    folder = tmp_path / "clients"
    store = ClientStore(folder, budget)
    checkpoint, expected, now = {}, {}, {}
    with monkeypatch.context() as patch:
        kill_at(patch, last)
        try:
            for number in range(1, 7):
                values = {client: 10.0 * number + client for client in (number % 3, 3)}
                for client, value in values.items():
                    store.stage(client, state(value), number)
                store.commit()
                now |= values
                if number % 2 == 0:
                    checkpoint, expected = checkpoint | store.save(), dict(now)
                    store.drop_replaced()
        except Killed:
            pass
    remove_old_states(folder, checkpoint)
    assert files(folder) == sorted(f"{c}-{v}.pt" for c, v in checkpoint.items())
    after = ClientStore(folder, budget, checkpoint)
    assert {client: value_of(after, client) for client in expected} == expected


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from federation.client_store import ClientStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = ClientStore(Path(sys.argv[1]), 1)
store.stage(1, {"residual": torch.zeros(10)}, 1)
store.commit()
store.save()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    store.stage(1, {"residual": torch.zeros(1_000_000)}, 2)
except OSError as error:
    print(error.filename, error.strerror, sep="|")
"""


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    """A file may not grow past a limit; torch's writer alone would raise a RuntimeError."""
    folder = tmp_path / "clients"
    command = [sys.executable, "-c", FULL_DISK, str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == f"{folder / '1-2.pt'}|File too large\n", done.stderr
    assert torch.equal(ClientStore(folder, 1, {1: 1}).get(1)["residual"], torch.zeros(10))


def stage_a_hundred_states(folder: Path) -> None:
    """100 states of 4 MB in two rounds, 20 MB of budget: the process grows by little more."""
    store = ClientStore(folder, 20e6)
    residual = torch.ones(1_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in (1, 2):
        for client in range(50):
            old = store.get(client)
            store.stage(client, {"residual": residual + (old["residual"] if old else 0)}, number)
        store.commit()
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert store.on_host.num_bytes <= 20e6 and grown < 60e6, grown
    assert torch.equal(store.get(31)["residual"], residual * 2)


def test_memory_stays_within_the_budget(tmp_path):
    """In a process of its own, where each state has its pages: glibc's heap may keep holes."""
    folders = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests/federation")]
    script = f"import sys; sys.path[:0] = {folders}; from test_client_store import *; "
    script += f"stage_a_hundred_states(Path({str(tmp_path)!r}))"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [PYTHON, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- whole runs (slow) ----------------------------------------------------------------------------

SPILLING = ["clients.total=12", "clients.per_round=6", "rounds=30", "checkpoint.every=2"]
SPILLING += ["clients.state_memory_gib=2e-4", "local.batch_size=8", "evaluation.every=1000"]


def unkilled(folder: Path) -> tuple[dict[tuple[int, int], bytes], str]:
    """Every residual that a run ever has, by client and version, and its model at the end."""
    one, seen, threads = make_federation(folder, *SPILLING), {}, torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that are killed, or the sums differ
    for _ in range(one.config.rounds):
        one.run_round()
        for client, version in one.clients.store.versions.items():
            seen[client, version] = one.clients.store.get(client)["residual"].numpy().tobytes()
    torch.set_num_threads(threads)
    return seen, one.server.sha256()


@pytest.mark.slow
def test_residuals_that_spill_survive_real_kills(tmp_path):
    """SIGKILL after a few more rounds each time, also between two checkpoints."""
    seen, expected = unkilled(tmp_path / "unkilled")
    folder = tmp_path / "tiny-s1"
    command = [PYTHON, *tiny_command(tmp_path, *SPILLING)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    for num_rounds in (1, 5, 8, 15):
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=one_thread, stdout=subprocess.DEVNULL
        )
        rounds = folder / "rounds.jsonl"
        while process.poll() is None:
            if rounds.exists() and rounds.read_text().count("\n") >= num_rounds:
                process.kill()
            time.sleep(0.01)
        assert process.returncode == -signal.SIGKILL
        if num_rounds > 2:
            versions = torch.load(folder / "checkpoint.pt", weights_only=True)["clients"]
            store = ClientStore(folder / "clients", 1, versions)
            assert len(versions) >= 6
            for key in versions.items():
                assert store.get(key[0])["residual"].numpy().tobytes() == seen[key]
    done = launch(*command)
    assert done.returncode == 0, done.stderr
    assert summary(folder)["model_sha256"] == expected
