"""Placement of clients, teams of ranks, the exchange, and ranks that die."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.runs import PYTHON, REPOSITORY, SCRIPTS, launch, rounds, summary, tiny_command
from helpers.two_machines import two_machines
from hypothesis import given
from hypothesis import strategies as st

from distributed import Team, place

# SCAFFOLD's controls and error feedback's residuals move between ranks with their clients, on
# shards from 1 to 300 pictures; GroupNorm and BatchNorm.
UNEQUAL = ["local.algorithm=SCAFFOLD", "data.partition.name=exponential", "clients.total=6"]
UNEQUAL += ["local.steps=null", "local.epochs=1", "local.batch_size=64", "clients.per_round=5"]
GROUP = ["model.name=resnet18", "model.width=0.0625", "model.norm=group(2)", *UNEQUAL]
# Models of nodes, and residuals between edge rounds, are states of clients too.
GOSSIP = ["schedule.name=gossip", "clients.per_round=4", "server.optimizer=FedAvg"]
GOSSIP += ["uplink.error_feedback=false", "schedule.gamma=0.5"]
EDGES = ["schedule.name=hierarchical", "schedule.edges=2", "schedule.edge_rounds=2"]
# Owed and received in the coordinates of a slice, and widths drawn in every batch.
SLICES = ["submodel.widths=[1,0.5,0.25]", "submodel.ordered_dropout=true"]
SLICES += ["downlink.mode=copies", "downlink.values=int8"]
BATCH = ["model.name=resnet18", "model.width=0.0625", *UNEQUAL, "data.partition.name=linear"]


def port(first: int = 20000) -> str:
    return str(first + os.getpid() % 20000)


def torchrun(num_ranks: int, folder, *words: str, timeout: float = 240):
    command = [str(SCRIPTS / "torchrun"), "--nproc_per_node", str(num_ranks)]
    command += ["--master_port", port(), *tiny_command(folder, *words)]
    done = launch(*command, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "tiny-s1"


# --- placement ------------------------------------------------------------------------------------


def test_the_longest_goes_first_to_the_team_that_is_done_first():
    costs = {0: 2.0, 1: 9.0, 2: 3.0, 3: 4.0, 4: 4.0}
    # 9 -> team 0; 4 (client 3), 4 (client 4) -> team 1; 3 -> team 1 at 8; 2 -> team 0 at 9
    assert place(costs, 2, {1: 0}) == {1: 0, 3: 1, 4: 1, 2: 1, 0: 0}


def test_a_client_stays_at_home_where_teams_are_done_together():
    assert place({4: 1.0, 5: 1.0}, 3, {4: 2, 5: 1}) == {4: 2, 5: 1}
    assert place({4: 1.0, 5: 1.0}, 3, {}) == {4: 1, 5: 2}  # a home that is not known: client mod 3
    homes = {0: 0, 1: 0, 2: 1, 3: 1}
    assert place(dict.fromkeys(homes, 1.0), 2, homes) == homes


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 8))
def test_no_team_works_longer_than_grahams_bound(costs, num_teams):
    placed = place(dict(enumerate(map(float, costs))), num_teams, {})
    loads = [sum(costs[c] for c, t in placed.items() if t == team) for team in range(num_teams)]
    least = max(max(costs), -(-sum(costs) // num_teams))  # no placement is better than that
    assert len(placed) == len(costs) and max(loads) <= least + max(costs) * (1 - 1 / num_teams)


def place_slowly(costs, num_teams, holders):
    """The rule, word for word: every step looks at all teams and all waiting clients."""
    loads, placed = [0.0] * num_teams, {}
    waiting = sorted(costs, key=lambda client: (-costs[client], client))
    while waiting:
        least = [team for team in range(num_teams) if loads[team] == min(loads)]
        longest = [client for client in waiting if costs[client] == costs[waiting[0]]]
        held = (c for c in longest if holders.get(c, c % num_teams) in least)
        client = next(held, longest[0])
        holder = holders.get(client, client % num_teams)
        placed[client] = holder if holder in least else least[0]
        loads[placed[client]] += costs[client]
        waiting.remove(client)
    return placed


@st.composite
def cohorts(draw):
    """Costs of which many are equal and some 0, and holders of some clients' states."""
    num_teams, most = draw(st.integers(1, 7)), draw(st.sampled_from([1, 2, 3, 100]))
    clients = draw(st.sets(st.integers(0, 60), max_size=25))
    costs = {client: float(draw(st.integers(0, most))) for client in sorted(clients)}
    known = [client for client in costs if draw(st.booleans())]
    return costs, num_teams, {client: draw(st.integers(0, num_teams - 1)) for client in known}


@given(cohorts())
def test_fast_placement_answers_as_the_slow_one(cohort):
    assert place(*cohort) == place_slowly(*cohort)


@pytest.mark.parametrize("most", [1, 300, 10**9])
def test_placing_many_clients_takes_no_time(most):
    costs = {client: float(1 + client * 7919 % most) for client in range(20_000)}
    begin = time.process_time()
    place(costs, 8, {})
    assert time.process_time() - begin < 3  # 0.3 s; the slow one takes more than 10


def test_a_team_of_one_does_nothing():
    tensor = torch.ones(3)
    Team().sum_(tensor)
    assert tensor.tolist() == [1, 1, 1] and Team().broadcast("state") == "state"


# --- the same model for any number of ranks -------------------------------------------------------


def run_alone(folder, words):
    done = launch(PYTHON, *tiny_command(folder, *words))
    assert done.returncode == 0, done.stderr
    return folder / "tiny-s1"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_alone(tmp_path_factory.mktemp("alone"), GROUP)


def assert_same(one, other):
    assert summary(other)["model_sha256"] == summary(one)["model_sha256"]
    assert (other / "ledger.csv").read_text() == (one / "ledger.csv").read_text()
    assert summary(other)["client_accuracy_mean"] == summary(one)["client_accuracy_mean"]
    assert described(other) == described(one)


def described(folder) -> list[tuple]:
    """What rounds.jsonl says of the updates."""
    keys = "residual_norm", "bytes_by_part", "bytes_by_tensor"
    return [tuple(row[key] for key in keys) for row in rounds(folder)]


def test_states_move_between_ranks_and_the_model_is_that_of_one(alone, tmp_path):
    assert_same(alone, torchrun(4, tmp_path, *GROUP))


@pytest.mark.parametrize("words", [GOSSIP, EDGES, SLICES], ids=["gossip", "hierarchical", "slices"])
def test_topologies_and_slices_end_the_same_on_two_ranks(tmp_path, words):
    one = run_alone(tmp_path / "one", words)
    assert_same(one, torchrun(2, tmp_path / "two", *words))


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_batchnorm_network_ends_the_same(tmp_path, num_ranks):
    one = run_alone(tmp_path / "one", BATCH)
    assert_same(one, torchrun(num_ranks, tmp_path / "many", *BATCH))


LANES = ["model.name=cnn", "model.width=0.25", "local.lanes=2", "local.algorithm=SCAFFOLD"]
FEDBUFF = ["schedule.name=fedbuff", "schedule.buffer=2", "network.spread=1"]
CARRY = ["schedule.late=carry", "schedule.deadline_seconds=0.7", "network.uplink_mbps=0.1"]
CARRY += ["network.availability.dropout=0.2", "local.fit_deadline=true", "network.spread=1"]
CARRY += ["network.ms_per_example=10", "rounds=6"]


@pytest.mark.slow
@pytest.mark.parametrize("words", [LANES, FEDBUFF, CARRY], ids=["lanes", "fedbuff", "carry"])
def test_two_ranks_end_the_same_in_lanes_and_without_rounds(tmp_path, words):
    one = run_alone(tmp_path / "one", words)
    assert_same(one, torchrun(2, tmp_path / "two", *words))


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 7])  # 7: more than there are clients in a round
def test_other_numbers_of_ranks(alone, tmp_path, num_ranks):
    assert_same(alone, torchrun(num_ranks, tmp_path, *GROUP))


@pytest.mark.slow
@pytest.mark.parametrize("words", [GROUP, BATCH], ids=["GroupNorm", "BatchNorm"])
def test_deepspeed_on_1_2_and_4_ranks(tmp_path, words):
    one = run_alone(tmp_path / "one", words)
    for count in ("1", "2", "4"):
        command = [str(SCRIPTS / "deepspeed"), "--num_gpus", count, "--master_port", port()]
        done = launch(*command, *tiny_command(tmp_path / count, *words))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert_same(one, tmp_path / count / "tiny-s1")


def test_deepspeeds_engine_without_a_launcher(alone, tmp_path):
    """The same bits in fp32; its logs are in the run folder; unknown keys are refused."""
    pytest.importorskip("deepspeed")
    config = tmp_path / "deepspeed.json"
    logs = {"wall_clock_breakdown": True, "comms_logger": {"enabled": True}}
    config.write_text(json.dumps({"zero_optimization": {"stage": 0}, **logs}))
    words = [*GROUP, "distributed.engine=deepspeed", f"deepspeed_config={config}"]
    one = run_alone(tmp_path, words)
    assert_same(alone, one)
    assert "step" in (one / "deepspeed_wall_clock.rank0.txt").read_text()
    lines = (one / "deepspeed_comms.rank0.jsonl").read_text().splitlines()
    assert len(lines) == 4 * 5  # rounds, clients
    config.write_text(json.dumps({"gradient_compression": {"enabled": True}}))
    done = launch(PYTHON, *tiny_command(tmp_path / "refused", *words))
    assert done.returncode == 2 and done.stderr.count("error:") == 1
    assert "DeepSpeed has no key gradient_compression" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_zero_within_a_team_is_near_one_rank(tmp_path, stage):
    words = [*TEAM, "local.algorithm=SCAFFOLD"]
    one = run_alone(tmp_path / "one", words)
    config = tmp_path / "deepspeed.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    words += ["distributed.ranks_per_client=2", f"deepspeed_config={config}"]
    four = torchrun(4, tmp_path / "four", *words, "distributed.engine=deepspeed")
    states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (one, four)]
    torch.testing.assert_close(*(s["parameters"] for s in states), rtol=1e-5, atol=1e-5)


def test_an_all_reduce_of_sums_is_near(alone, tmp_path):
    """It exchanges sums in place of payloads; what clients sent, and the ledger, are the same."""
    two = torchrun(2, tmp_path / "sums", *GROUP, "distributed.exchange=allreduce")
    states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (alone, two)]
    torch.testing.assert_close(*(s["parameters"] for s in states), rtol=1e-4, atol=1e-5)
    kinds = [[r.split(",")[:4] for r in (f / "ledger.csv").open()] for f in (alone, two)]
    assert kinds[0] == kinds[1]
    assert described(two)[0] == described(alone)[0]  # later ones are of models that differ
    assert all(row["bytes_between_ranks"] for row in rounds(two))


def test_what_ranks_exchange_is_counted_beside_the_ledger(alone, tmp_path):
    two = torchrun(2, tmp_path, *GROUP)
    assert all(row["bytes_between_ranks"] == 0 for row in rounds(alone))
    for row in rounds(two):  # payloads of the other rank, padded to the longer, and a few lines
        assert 0 < row["bytes_between_ranks"] < row["bytes_up"] + 8000
    assert summary(two)["bytes_up"] == summary(alone)["bytes_up"]
    assert_same(alone, two)


# --- teams ----------------------------------------------------------------------------------------

TEAM = ["model.name=resnet18", "model.width=0.0625", "model.norm=group(2)", "rounds=3"]
TEAM += ["pruning.method=none", "uplink.values=fp32", "local.batch_size=17", "local.clip=1"]


def test_two_ranks_a_client_train_as_one(tmp_path):
    words = [*TEAM, "local.algorithm=SCAFFOLD"]
    one = run_alone(tmp_path / "one", words)
    four = torchrun(4, tmp_path / "four", *words, "distributed.ranks_per_client=2")
    states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (one, four)]
    torch.testing.assert_close(*(s["parameters"] for s in states), rtol=1e-5, atol=1e-5)
    losses = [[row["train_loss"] for row in rounds(folder)] for folder in (one, four)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert (one / "ledger.csv").read_text() == (four / "ledger.csv").read_text()


THREADS_AFTER_CLOSE = """
import sys
from pathlib import Path
sys.path.insert(0, ".")
from config import Config, Distributed
from distributed import Ranks
ranks = Ranks(Config(distributed=Distributed(engine=sys.argv[1], ranks_per_client=2)))
ranks.gather_json(None)
ranks.close()
threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
print([thread for thread in threads if "gloo" in thread])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("engine", ["accelerate", "deepspeed"])
def test_no_thread_of_gloo_is_left_once_the_ranks_have_parted(tmp_path, engine):
    """One that outlives the interpreter ends the process by std::terminate, now and then."""
    script = tmp_path / "part.py"
    script.write_text(THREADS_AFTER_CLOSE)
    command = [str(SCRIPTS / "torchrun"), "--nproc_per_node", "2", "--master_port", port()]
    done = launch(*command, str(script), engine)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.replace("\n", "") == "[][]"  # a line of each, perhaps run together


def test_teams_that_do_not_come_out_even_are_refused(tmp_path):
    command = [str(SCRIPTS / "torchrun"), "--nproc_per_node", "3", "--master_port", port()]
    done = launch(*command, *tiny_command(tmp_path, "distributed.ranks_per_client=2"))
    assert done.returncode != 0
    assert "error: distributed.ranks_per_client: 2 does not divide the 3 processes" in done.stderr


# --- several machines, and ranks that die ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "python"])
@pytest.mark.parametrize("master", ["10.77.0.1", "node0"])
def test_two_machines_end_with_the_model_of_one(alone, tmp_path, launcher, master):
    """As docs/ranks.md says, where node0 is 127.0.1.1 to itself and 10.77.0.1 to node1."""
    words = tiny_command(tmp_path, *GROUP)
    torchrun = [str(SCRIPTS / "torchrun"), "--nnodes", "2", "--nproc_per_node", "1"]
    torchrun += ["--master_addr", master, "--master_port", "29500", "--node_rank"]
    pair = {"WORLD_SIZE": "2", "MASTER_ADDR": master, "MASTER_PORT": "29500"}
    with two_machines(tmp_path) as start:
        if launcher == "torchrun":
            nodes = [start(rank, *torchrun, str(rank), *words) for rank in (0, 1)]
        else:
            nodes = [start(rank, PYTHON, *words, RANK=str(rank), **pair) for rank in (0, 1)]
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert_same(alone, tmp_path / "tiny-s1")


@pytest.mark.slow
def test_machines_that_do_not_reach_each_other_end_within_a_minute(tmp_path):
    """They meet, but the network interface that the user chose does not lead to the other."""
    pair = {"WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500"}
    pair["GLOO_SOCKET_IFNAME"] = "lo"
    with two_machines(tmp_path) as start:
        begin = time.monotonic()
        command = [PYTHON, *tiny_command(tmp_path, *GROUP)]
        nodes = [start(rank, *command, RANK=str(rank), **pair) for rank in (0, 1)]
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
        assert time.monotonic() - begin < 60 + 40  # of which up to 40 for the start of python
    assert "cannot connect to each other" in "".join(outputs)  # the other: connection refused
    for node, output in zip(nodes, outputs, strict=True):
        assert node.returncode == 1 and "Traceback" not in output, output
        assert output.splitlines()[-1].startswith("rank "), output
    assert not (tmp_path / "tiny-s1").exists()


def workers(process: subprocess.Popen) -> list[int]:
    """The ranks below a launcher, by process id."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True
    )
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "main.py" in line]


def kill_one_rank(folder, launcher: list[str], words: list[str], after: int) -> tuple:
    """Start, SIGKILL the last rank after some rounds; return (the launcher's process, when)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*launcher, *tiny_command(folder, *words)],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = folder / "tiny-s1" / "rounds.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= after):
        time.sleep(0.02)
    assert process.returncode is None, process.stdout.read()
    os.kill(max(workers(process)), signal.SIGKILL)
    return process, time.monotonic()


def test_when_a_rank_dies_the_others_say_so_and_the_same_command_goes_on(alone, tmp_path):
    launcher = [str(SCRIPTS / "torchrun"), "--nproc_per_node", "4", "--master_port", port()]
    process, killed = kill_one_rank(tmp_path, launcher, GROUP, after=2)
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0 and time.monotonic() - killed < 60
    assert "error: another process of this run is gone or does not answer" in output
    assert 'main.py", line' not in output  # no traceback of ours
    assert_same(alone, torchrun(4, tmp_path, *GROUP))


@pytest.mark.slow
def test_a_launcher_that_restarts_needs_no_hand(alone, tmp_path):
    launcher = [str(SCRIPTS / "torchrun"), "--nproc_per_node", "4", "--max_restarts", "1"]
    launcher += ["--master_port", port()]
    words = [*GROUP, "checkpoint.every=1"]
    process, _ = kill_one_rank(tmp_path, launcher, words, after=2)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "resuming" in output
    assert_same(alone, tmp_path / "tiny-s1")
