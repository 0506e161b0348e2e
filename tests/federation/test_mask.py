"""mask.py and what hangs on it: whole runs with a mask, against what their payloads say."""

from collections import Counter

import numpy as np
import pytest
import torch
from helpers.ends import make_server, mask_messages
from helpers.runs import REPOSITORY, TINY, ledger, make_federation, summary

import pruning
from command_line import load_config
from compression import decode
from config import Config, Mask, Pruning
from federation import client
from federation.mask import SharedMask
from federation.server import Average, Server
from federation.synchronous import Synchronous
from layout import Layout
from wire.container import PayloadError
from wire.positions import unpack_positions

SNIP = ["pruning.mask.method=snip", "pruning.mask.density=0.2", "pruning.mask.batches=2"]
DYNAMIC = ["pruning.mask.method=dynamic", "pruning.mask.density=0.2", "pruning.mask.every=2"]
SETTINGS = {
    "snip": [*SNIP, "pruning.method=none", "uplink.values=fp16"],
    "dynamic": [*DYNAMIC, "downlink.mode=change", "downlink.values=fp16"],
}
LAYOUT = Layout(("w", "b", "v"), ((100, 90), (100,), (10, 100)))  # 10,000 of 10,100 are prunable


def outside(kept: np.ndarray, size: int) -> torch.Tensor:
    return torch.from_numpy(np.setdiff1d(np.arange(size), kept))


# --- which client is told what --------------------------------------------------------------------


def dynamic_server() -> Server:
    mask = Mask(method="dynamic", density=0.2, every=1)
    return make_server(Config(rounds=100, pruning=Pruning(mask=mask)), LAYOUT)


def regrow(server: Server, round_number: int, cohort: list[int]) -> None:
    """End a round of this cohort with a change of the mask."""
    generator = torch.Generator().manual_seed(round_number)
    weights, server.growth = torch.randn(2, LAYOUT.size, generator=generator)
    server.parameters.data.copy_(weights)
    server.commit(round_number, cohort)


def test_clients_get_the_change_or_the_mask_or_nothing():
    server = dynamic_server()
    first = server.mask.kept
    told = mask_messages(server, 1, [0, 1])
    assert told == {0: [], 1: []}  # everybody can draw the first mask
    regrow(server, 1, [])
    second = server.mask.kept
    (change,) = mask_messages(server, 2, [0, 1])[1]
    assert change.kind == "mask_change" and change.dense_values == 0
    toggled = unpack_positions(change.payload, LAYOUT)
    assert np.setxor1d(first, toggled).tolist() == second.tolist()
    server.commit(2, [0])
    assert mask_messages(server, 3, [0]) == {0: []}
    regrow(server, 3, [])
    told = mask_messages(server, 4, [0, 1])
    assert [m.kind for m in told[0]] == ["mask_change"]
    assert [m.kind for m in told[1]] == ["mask"]  # it missed one change: that alone would not do
    assert unpack_positions(told[1][0].payload, LAYOUT).tolist() == server.mask.kept.tolist()
    toggled = unpack_positions(told[0][0].payload, LAYOUT)
    assert np.setxor1d(second, toggled).tolist() == server.mask.kept.tolist()


def test_a_change_that_is_longer_than_the_mask_is_not_sent():
    mask = Mask(method="snip", density=0.1)
    server = make_server(Config(rounds=1, pruning=Pruning(mask=mask)), LAYOUT)
    assert server.mask.awaits_scores and server.mask.pruned is None
    server.prune(torch.rand(LAYOUT.size, generator=torch.Generator().manual_seed(1)))
    assert not server.mask.awaits_scores
    (whole,) = mask_messages(server, 1, [7])[7]
    assert whole.kind == "mask" and whole.num_values == 1000 + 100
    pruned = server.mask.pruned
    assert pruned.sum() == 9000 and not pruned[9000:9100].any()
    assert not server.parameters[pruned].any() and server.parameters[~pruned].all()


def test_a_mask_comes_back_from_its_checkpoint():
    server, again = dynamic_server(), dynamic_server()
    regrow(server, 1, [2])
    regrow(server, 2, [2])
    again.load(server.state())
    assert mask_messages(again, 3, [0, 2]) == mask_messages(server, 3, [0, 2])
    assert again.mask.kept.tolist() == server.mask.kept.tolist()


def test_the_mask_never_changes_after_the_last_round():
    mask = SharedMask(Mask(method="dynamic", every=4), LAYOUT, rounds=12, seed=0)
    assert [n for n in range(1, 13) if mask.grows_in(n)] == [4, 8]


# --- whole runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SETTINGS)
def test_the_global_model_and_all_messages_stay_on_the_mask(tmp_path, monkeypatch, method):
    received, learned = [], []
    original = client.train_client

    def train(engine, *rest):
        received.append(engine.model.read_parameters().clone())
        loss = original(engine, *rest)
        learned.append(engine.model.read_parameters().clone())
        return loss

    monkeypatch.setattr(client, "train_client", train)
    one = make_federation(tmp_path, *SETTINGS[method], "local.clip=0.5", "server.optimizer=FedAvgM")
    size, counts = one.model.layout.size, set()
    for number in range(1, 5):
        before = one.server.mask.kept
        one.run_round()
        for vector in (*received, *learned):
            kept = one.server.mask.kept if before is None else before
            assert not vector[outside(kept, size)].any() and vector.any()
        received.clear()
        learned.clear()
        assert not one.server.parameters[outside(one.server.mask.kept, size)].any()
        changed = before is not None and before.tolist() != one.server.mask.kept.tolist()
        assert changed == (method == "dynamic" and number == 2)
        counts.add(len(one.server.mask.kept))
    assert len(counts) == 1
    assert one.server.density() <= counts.pop() / size


def test_snip_keeps_the_weights_with_the_best_averaged_scores(tmp_path, monkeypatch):
    one = make_federation(tmp_path, *SNIP, "clients.total=3", "clients.per_round=3")
    weights, examples, scores = one.server.parameters.detach().clone(), [], []
    original = Average.decode

    def note_and_decode(self, report, round_number):
        [message] = report.messages
        assert message.kind == "scores"
        examples.append(float(report.num_examples))
        scores.append(decode(message.payload, one.model.layout).dense())
        return original(self, report, round_number)

    monkeypatch.setattr(Average, "decode", note_and_decode)
    state = torch.random.get_rng_state()
    one._choose_mask([0, 1, 2])
    assert torch.equal(torch.random.get_rng_state(), state)
    examples, scores = torch.tensor(examples), torch.stack(scores)
    average = (scores * (examples / examples.sum())[:, None]).sum(0)
    sizes, shapes = one.model.layout.sizes, one.model.layout.shapes
    prunable = np.repeat([len(shape) >= 2 for shape in shapes], sizes)
    k = pruning.num_kept(0.2, prunable.sum())
    best = torch.where(torch.from_numpy(prunable), average, -1.0).topk(k).indices
    kept = np.union1d(best.numpy(), np.flatnonzero(~prunable))
    assert len(np.setdiff1d(kept, one.server.mask.kept)) <= 2  # sums in another order, near ties
    assert torch.equal(
        one.server.parameters[torch.from_numpy(kept)], weights[torch.from_numpy(kept)]
    )


def test_the_ledger_of_snip(run):
    status, folder = run(*SETTINGS["snip"])
    assert status == 0
    rows = ledger(folder)
    first = [row for row in rows if row["round"] == "0"]
    assert Counter((r["direction"], r["kind"]) for r in first) == {
        ("down", "model"): 3,
        ("up", "scores"): 3,
    }
    assert all(row["dense_bytes"] == "0" for row in first)
    told = [row["receiver"] for row in rows if row["kind"] == "mask"]
    assert sorted(told) == ["0", "1", "2", "3"]  # each once, when it first takes part
    for row in rows:
        if row["kind"] == "update":  # two bytes a value on the mask and the container
            assert int(row["bytes"]) == 2 * int(row["num_values"]) + 32
    result = summary(folder)
    for direction in ("up", "down"):
        total = sum(int(row["bytes"]) for row in rows if row["direction"] == direction)
        assert result[f"bytes_{direction}"] == total
    assert 0.19 < result["density"] < 0.22


def test_the_ledger_of_a_dynamic_mask(run):
    status, folder = run(*SETTINGS["dynamic"])
    assert status == 0
    kinds = Counter((r["round"], r["kind"]) for r in ledger(folder))
    assert {round for round, kind in kinds if kind == "growth"} == {"2"}
    assert kinds["2", "growth"] == 3 and kinds["3", "mask_change"] == 3
    assert summary(folder)["density"] < 0.22


class Killed(BaseException):
    """Ends a run on the spot."""


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("last_call", [2, 9])  # of train: in round 1 and in round 3
def test_a_killed_run_resumes_to_the_same_end(run, monkeypatch, method, last_call):
    _, whole = run(*SETTINGS[method], name="whole")
    original, calls = client.train_client, []

    def train(*args):
        calls.append(1)
        if len(calls) == last_call:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(client, "train_client", train)
        with pytest.raises(Killed):
            run(*SETTINGS[method], name="killed")
    assert run(*SETTINGS[method], name="killed")[0] == 0
    killed = whole.parent / "killed-s1"
    assert summary(killed)["model_sha256"] == summary(whole)["model_sha256"]
    assert (killed / "ledger.csv").read_text() == (whole / "ledger.csv").read_text()


def test_an_interrupt_between_scoring_and_round_1_loses_nothing(run, monkeypatch):
    _, whole = run(*SETTINGS["snip"], name="whole")
    original = Synchronous._choose_mask

    def stop_after(self, cohort):
        original(self, cohort)
        self.clients.stop_requested = True

    with monkeypatch.context() as patch:
        patch.setattr(Synchronous, "_choose_mask", stop_after)
        assert run(*SETTINGS["snip"], name="stopped")[0] == 130
    monkeypatch.setattr(Synchronous, "_choose_mask", None)  # the mask is in the checkpoint
    status, stopped = run(*SETTINGS["snip"], name="stopped")
    assert status == 0
    assert summary(stopped)["model_sha256"] == summary(whole)["model_sha256"]
    assert (stopped / "ledger.csv").read_text() == (whole / "ledger.csv").read_text()
    assert summary(stopped)["simulated_seconds"] == summary(whole)["simulated_seconds"]


def test_what_was_owed_outside_a_new_mask_is_forgotten(tmp_path):
    one = make_federation(tmp_path, *DYNAMIC, "clients.total=3", "clients.per_round=3")
    one.run_round()
    one.run_round()  # the mask changes at its end
    gone = outside(one.server.mask.kept, one.model.layout.size)
    assert one.clients.store.get(0)["residual"][gone].any()
    one.run_round()
    assert not one.clients.store.get(0)["residual"][gone].any()
    assert one.clients.store.get(0)["residual"].any()


def test_ends_with_different_masks_refuse_each_other(tmp_path):
    one = make_federation(tmp_path, *DYNAMIC)
    channel = one.server.agreement.channel("up", "update")
    payload, _ = channel.encode(torch.ones(one.model.layout.size), 1, 0)
    channel.use_mask(one.server.mask.kept[1:])
    with pytest.raises(PayloadError, match="another layout"):
        channel.decode(payload, 1, 0)


def test_a_batchnorm_network_with_a_mask_keeps_its_statistics_sane(tmp_path):
    resnet = ["model.name=resnet18", "model.width=0.125", "rounds=3", "server.optimizer=FedAvg"]
    one = make_federation(tmp_path, *DYNAMIC, "pruning.mask.every=1", *resnet)
    for _ in range(3):
        one.run_round()
    assert (one.server.buffers[one.server.is_counter] == 6).all()  # two training steps a round
    names, offsets = one.model.buffer_layout.names, one.model.buffer_layout.offsets
    for name, start, stop in zip(names, offsets[:-1], offsets[1:], strict=True):
        if name.endswith("running_var"):
            assert (one.server.buffers[start:stop] > 0).all()
    assert torch.isfinite(one.server.parameters).all()


def test_dry_run_counts_the_pruned_model(tmp_path, capsys):
    from experiment import main

    sizes = {}
    for method in ("none", "snip", "dynamic"):
        words = [*TINY, f"output_dir={tmp_path}", f"pruning.mask.method={method}"]
        config = load_config(REPOSITORY / "configs/default.yaml", words)
        assert main(config, dry_run=True) == 0
        line = next(li for li in capsys.readouterr().out.splitlines() if "down model " in li)
        count, *_, size, _ = line.split(", ")[0].split()
        sizes[method] = int(count), float(size)  # MB of so many messages
    assert sizes["none"][0] == sizes["dynamic"][0] == 3
    assert sizes["dynamic"][1] < 0.2 * sizes["none"][1]
    assert sizes["snip"][0] == 6  # the whole model to be scored, then what is left of it
    both = sizes["none"][1] + sizes["dynamic"][1]
    assert sizes["snip"][1] == pytest.approx(both, abs=0.0015)
