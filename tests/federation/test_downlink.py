"""The downlink: what the server holds to be a client's model is what that client can decode."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.runs import damage_first, ledger, make_federation, summary

from compression import OVERHEAD, decode
from config import Config, Downlink, Selection
from federation.agreement import Agreement
from federation.channel import Channel
from federation.downlink import Changes, Copies, WholeModel
from layout import Layout
from run_folder import RunFolder

LAYOUT = Layout(("w", "b"), ((30, 20), (30,)))
SEED = Config(seed=7).seed_for


def agreement(**downlink):
    return Agreement(Config(seed=7, downlink=Downlink(**downlink)), LAYOUT, Layout((), ()))


def changes(start, **settings):
    selection = Selection(**({"method": "topk", "density": 0.05} | settings))
    return Changes(agreement(mode="change", values="fp16", pruning=selection), start)


def copies(start, **settings):
    selection = Selection(**({"method": "topk", "density": 0.05} | settings))
    return Copies(agreement(mode="copies", values="fp16", pruning=selection), start)


def moved(parameters, round):
    generator = torch.Generator().manual_seed(round)
    return parameters + 0.1 * torch.randn(len(parameters), generator=generator)


class Client:
    """Holds the first model, and then what it decoded."""

    def __init__(self, first):
        self.model = first.clone()

    def receive(self, messages):
        for message in messages:
            arrived = decode(message.payload, LAYOUT)
            if message.kind == "model":
                self.model = arrived.dense()
            else:
                arrived.add_to(self.model)


def test_every_client_decodes_the_shared_model_whatever_it_missed():
    parameters = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(0))
    link = changes(parameters, density=0.15)
    clients = [Client(parameters) for _ in range(12)]
    rng = np.random.default_rng(0)
    kinds = set()
    for round in range(1, 41):
        cohort = sorted(rng.choice(12, 3, replace=False).tolist())
        received, messages = link.send(parameters, round, cohort)
        link.commit(cohort)
        for client in cohort:
            clients[client].receive(messages[client])
            kinds.add((messages[client][0].kind, len(messages[client]) > 1))
            assert torch.equal(clients[client].model, received)
            assert messages[client][-1].dense_values == LAYOUT.size
            assert sum(message.dense_values for message in messages[client]) == LAYOUT.size
        parameters = moved(parameters, round)
    assert kinds == {("model", False), ("model_change", False), ("model_change", True)}


def test_what_is_missed_goes_in_whichever_form_is_shorter():
    parameters = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(0))
    link, lengths = changes(parameters, density=0.3), []
    link.send(parameters, 1, [0])
    link.commit([0])
    whole = OVERHEAD + 4 * LAYOUT.size
    for round in range(2, 10):
        parameters = moved(parameters, round)
        _, messages = link.send(parameters, round, [1])
        link.commit([1])
        lengths.append(len(link.changes[round].payload))
    _, messages = link.send(parameters, 10, [0])  # eight changes behind
    lengths.append(len(link.sent[1][10].payload))
    assert sum(lengths) > whole
    assert [message.kind for message in messages[0]] == ["model"]
    assert sum(len(change.payload) for change in link.changes.values()) <= whole


def test_compression_on_the_way_down_is_made_good():
    """Once the server's model stands still, what the clients have goes towards it."""
    parameters = torch.zeros(LAYOUT.size)
    link = changes(parameters)
    target = moved(parameters, 0)
    errors = []
    for round in range(1, 60):
        received, _ = link.send(target, round, [0])
        link.commit([0])
        errors.append(float((received - target).norm()))
    assert all(after <= before for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 1e-4 * errors[0]


def test_a_copy_is_what_its_client_has_decoded_and_what_it_lacks_is_owed():
    """However long a client was away it receives one message, and its copy comes nearer."""
    parameters = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(0))
    link, rng = copies(parameters), np.random.default_rng(0)
    clients, known = [Client(parameters) for _ in range(5)], {}
    for round_number in range(1, 30):
        parameters = moved(parameters, round_number)
        cohort = sorted(rng.choice(5, 2, replace=False).tolist())
        received, messages = link.send(parameters, round_number, cohort)
        bring = link.to_each(received, round_number)
        assert messages == {client: [] for client in cohort}
        for client in cohort:
            before = clients[client].model.clone()
            new, message = bring(client, known.get(client))
            clients[client].receive([message])
            assert (message.kind, message.receiver) == ("model_change", client)
            assert message.dense_values == LAYOUT.size
            assert torch.equal(clients[client].model, new)
            assert (parameters - new).norm() < (parameters - before).norm()
            known[client] = new
    for round_number in range(30, 90):  # the model stands still
        known[0], _ = link.to_each(parameters, round_number)(0, known[0])
    assert (parameters - known[0]).norm() < 1e-4 * parameters.norm()


def test_with_everybody_there_copies_are_what_changes_share():
    parameters = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(0))
    one, other, copy = changes(parameters), copies(parameters), None
    for round_number in range(1, 10):
        parameters = moved(parameters, round_number)
        shared, messages = one.send(parameters, round_number, [3])
        one.commit([3])
        copy, message = other.to_each(parameters, round_number)(3, copy)
        assert torch.equal(copy, shared)
        assert bytes(message.payload) == bytes(messages[3][0].payload)


def test_a_round_that_is_given_up_has_sent_nothing():
    parameters = torch.ones(LAYOUT.size)
    link = changes(torch.zeros(LAYOUT.size))
    first, _ = link.send(parameters, 1, [0])
    again, messages = link.send(parameters, 1, [0])
    assert torch.equal(first, again)
    assert link.version_of == {} and not link.shared.any()


def test_the_whole_model_arrives_as_it_is_rounded():
    parameters = moved(torch.zeros(LAYOUT.size), 0)
    received, messages = WholeModel(agreement(values="fp16")).send(parameters, 1, [4, 7])
    assert torch.equal(received, parameters.half().float())
    assert [message.receiver for some in messages.values() for message in some] == [4, 7]
    assert messages[4] == [replace(message, receiver=4) for message in messages[7]]
    assert messages[4][0].kind == "model"


def test_the_servers_random_choices_are_no_clients():
    link = Channel(LAYOUT, "fp32", Selection(method="random", density=0.1), 0, SEED)
    vector = torch.ones(LAYOUT.size)
    _, down = link.encode(vector, round_number=1)
    for client in range(5):
        _, up = link.encode(vector, round_number=1, client=client)
        assert not np.array_equal(down.indices, up.indices)


COMPRESSED = ["downlink.mode=change", "downlink.pruning.method=topk", "downlink.values=int8"]
COMPRESSED += ["downlink.pruning.density=0.05", "rounds=6", "clients.total=5"]


def test_a_run_with_a_compressed_downlink_says_what_it_sent(run):
    status, folder = run(*COMPRESSED)
    assert status == 0
    down = [row for row in ledger(folder) if row["direction"] == "down"]
    assert {row["kind"] for row in down} == {"model_change"}  # they have the first model
    result = summary(folder)
    assert result["bytes_down"] == sum(int(row["bytes"]) for row in down)
    assert result["dense_bytes_down"] == 6 * 3 * 4 * result["num_parameters"]
    assert result["bytes_down"] < 0.6 * result["dense_bytes_down"]


@pytest.mark.parametrize("mode, last_call", [("change", 2), ("change", 3), ("copies", 3)])
def test_a_killed_run_with_a_compressed_downlink_resumes_to_the_same_end(
    run, monkeypatch, mode, last_call
):
    class Killed(BaseException):
        pass

    def kill(self, *rest):
        calls.append(1)
        if len(calls) == last_call:
            raise Killed
        return original(self, *rest)

    calls, original = [], RunFolder.save
    words = [*COMPRESSED, f"downlink.mode={mode}"]
    _, whole = run(*words, name="whole")
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", kill)
        with pytest.raises(Killed):
            run(*words, name="killed")
    _, killed = run(*words, name="killed")
    assert summary(killed)["model_sha256"] == summary(whole)["model_sha256"]
    assert (killed / "ledger.csv").read_text() == (whole / "ledger.csv").read_text()


def test_a_client_that_was_cut_off_does_not_have_the_change(tmp_path):
    """It gets the change of its first round again, together with the next one."""
    path = tmp_path / "clients.csv"
    rows = [f"{mbps},50,1,0\n" for mbps in (10, 10, 10, 0.001)]
    path.write_text("uplink_mbps,downlink_mbps,latency_ms,ms_per_example\n" + "".join(rows))
    words = [*COMPRESSED[:4], "clients.per_round=4", f"network.clients_file={path}"]
    one = make_federation(tmp_path, *words, "schedule.deadline_seconds=5")
    for round_number in (1, 2):
        row, ledger_rows = one.run_round()
        assert row["late"] == [3]
        assert one.server.downlinks["model"].version_of == dict.fromkeys((0, 1, 2), round_number)
    sent = [row for row in ledger_rows if row.kind == "model_change"]
    assert {row.receiver: row.bytes for row in sent}["0"] < sum(
        row.bytes for row in sent if row.receiver == "3"
    )


COPIES = [*COMPRESSED, "downlink.mode=copies"]


def test_a_client_that_was_cut_off_goes_on_from_the_copy_before(tmp_path):
    """What it received counts in the ledger; like the server it forgets it."""
    path = tmp_path / "clients.csv"
    rows = [f"{mbps},50,1,0\n" for mbps in (10, 10, 10, 0.001)]
    path.write_text("uplink_mbps,downlink_mbps,latency_ms,ms_per_example\n" + "".join(rows))
    words = [*COPIES[:4], "clients.per_round=4", f"network.clients_file={path}"]
    words += ["downlink.mode=copies", "schedule.deadline_seconds=5"]
    one = make_federation(tmp_path, *words)
    for _ in (1, 2):
        row, ledger_rows = one.run_round()
        assert row["late"] == [3]
        received = {row.receiver for row in ledger_rows if row.kind == "model_change"}
        assert received == {"0", "1", "2", "3"}
        states = [one.clients.store.get(client) for client in range(4)]
        assert [("copy" in state) for state in states] == [True, True, True, False]


def test_a_client_whose_update_is_refused_goes_on_from_the_copy_before(tmp_path, monkeypatch):
    one = make_federation(tmp_path, *COPIES, "clients.total=3")
    one.run_round()
    before = [one.clients.store.get(client)["copy"] for client in range(3)]
    damage_first(monkeypatch)
    row, _ = one.run_round()
    assert list(row["failures"]) == ["0"]
    after = [one.clients.store.get(client)["copy"] for client in range(3)]
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("words", [["clients.state_memory_gib=1e-9"], ["local.lanes=2"]])
def test_copies_are_the_same_on_the_disk_and_in_lanes(tmp_path, words):
    common = [*COPIES, "server.optimizer=FedAvg", "model.name=cnn", "model.width=0.25"]
    one = make_federation(tmp_path, *common, "local.lanes=1", name="one")
    other = make_federation(tmp_path, *common, *words, name="other")
    for _ in range(3):
        one.run_round(), other.run_round()
    close = 1e-4 if "local.lanes=2" in words else 0.0
    torch.testing.assert_close(one.server.parameters, other.server.parameters, rtol=0, atol=close)
    for client in one.clients.store.versions:
        mine, its = (f.clients.store.get(client)["copy"] for f in (one, other))
        torch.testing.assert_close(mine, its, rtol=0, atol=close)
