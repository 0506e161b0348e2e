"""algorithms.py: the papers' formulas on small vectors, and every identity with FedAvg."""

import numpy as np
import pytest
import torch
from helpers.runs import damage_first, kinds, make_plain_federation, summary

from algorithms import ALGORITHMS, SCAFFOLD, FedAvg, FedCM, FedDyn, FedNova, FedProx, step_length
from compression import Decoded
from federation import client
from federation.server import Average
from federation.synchronous import Synchronous

# --- step_length ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_step_length_is_how_far_sgd_moves_by_gradients_of_one(steps, momentum, nesterov):
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([x], lr=0.1, momentum=momentum, nesterov=nesterov)
    for _ in range(steps):
        x.grad = torch.ones(1, dtype=torch.float64)
        sgd.step()
    assert step_length(0.1, steps, momentum, nesterov) == pytest.approx(-x.item(), rel=1e-12, abs=0)


# --- each by hand ---------------------------------------------------------------------------------
# A client of f(x) = (x - goal)^2 / 2 takes K steps of plain SGD with lr = 0.5 from x = 8.


def arrive(vector):
    """What the receiver decodes of a vector of which nothing is lost."""
    return Decoded(len(vector), None, vector.numpy().copy())


def train_once(algorithm, goal, kept=None, vector=None, steps=2, lr=0.5, start=8.0):
    """Train one coordinate; return (update, kept, besides)."""
    received, x = torch.tensor([start]), torch.tensor([start])
    local = algorithm.before(received, kept, vector, lambda: received - goal)
    for _ in range(steps):
        gradient = x - goal
        local.correct_gradient(x, gradient)
        x = x - lr * gradient
    update = x - received
    besides = local.after_training(update, step_length(lr, steps))
    arrived = {"update": arrive(update)}
    if besides is not None:
        arrived[algorithm.up] = arrive(besides)
    kept = local.after_sending(kept, arrived)
    return update.tolist(), None if kept is None else kept.tolist(), besides


def test_fedprox_by_hand():
    # goal 0, mu 0.5: 8 -> 8 - (8 + 0) / 2 = 4 -> 4 - (4 + 0.5 * (4 - 8)) / 2 = 3
    assert train_once(FedProx(mu=0.5), 0.0) == ([-5.0], None, None)


def test_scaffold_by_hand():
    # c = 2, c_i = 1, goal 0: 8 -> 8 - (8 + 1) / 2 = 3.5 -> 3.5 - (3.5 + 1) / 2 = 1.25
    c_i, c = torch.tensor([1.0]), torch.tensor([2.0])
    update, kept, change = train_once(SCAFFOLD(), 0.0, c_i, c)
    assert update == [-6.75]
    # option 2: c_i+ = 1 - 2 + 6.75 / (2 * 0.5) = 5.75, so it changes by 4.75
    assert change.tolist() == [4.75] and kept == [5.75] and c_i.tolist() == [1.0]
    # that is c_i+ = the mean gradient of the two steps, (8 + 3.5) / 2
    assert 1 + change.item() == (8 + 3.5) / 2
    # option 1: c_i+ = the gradient at the received model, 8
    _, kept, change = train_once(SCAFFOLD(option=1), 0.0, c_i, c)
    assert change.tolist() == [7.0] and kept == [8.0]


def test_scaffolds_c_moves_by_the_share_of_the_cohort():
    c, averages = torch.tensor([2.0]), {"update": torch.ones(1), "control": torch.tensor([3.0])}
    SCAFFOLD().aggregate(averages, c, share=0.1, step_length=1.0)
    assert c.item() == pytest.approx(2.3) and averages["update"].item() == 1.0


def test_fednova_by_hand():
    """Two clients of equal size with 1 and 3 steps, lr 0.5: tau_eff = 2."""
    updates = [
        train_once(FedNova(), goal, steps=steps)[0][0] for goal, steps in ((0.0, 1), (4.0, 3))
    ]
    # 8 -> 4 with goal 0: d = -4 / 0.5 = -8; 8 -> 6 -> 5 -> 4.5 with goal 4: d = -3.5 / 1.5
    assert updates == pytest.approx([-8.0, -7 / 3])
    averages = {"update": torch.tensor([sum(updates) / 2])}
    FedNova().aggregate(averages, None, share=1.0, step_length=0.5 * (1 + 3) / 2)
    assert averages["update"].item() == pytest.approx((-8.0 - 7 / 3) / 2)


def test_feddyn_by_hand():
    # alpha 0.5, g_i = 2, goal 0: 8 -> 8 - (8 - 2) / 2 = 5 -> 5 - (5 + 0.5 * (5 - 8) - 2) / 2 = 4.25
    update, kept, _ = train_once(FedDyn(alpha=0.5), 0.0, torch.tensor([2.0]))
    assert update == [-3.75]
    assert kept == [2 + 0.5 * 3.75]
    # the server: h = -alpha * (-3.75) / 10 for one of ten clients; x += -3.75 - h / alpha
    algorithm, held = FedDyn(alpha=0.5), torch.zeros(1)
    averages = {"update": torch.tensor([-3.75])}
    algorithm.aggregate(averages, held, share=0.1, step_length=1.0)
    h = -0.5 * -3.75 / 10
    assert averages["update"].item() == pytest.approx(-3.75 - h / 0.5)


def test_fedcm_by_hand():
    # alpha 0.25, Delta = 4, goal 0: 8 -> 8 - (2 + 3) / 2 = 5.5 -> 5.5 - (1.375 + 3) / 2 = 3.3125
    algorithm, delta = FedCM(alpha=0.25), torch.tensor([4.0])
    update, _, _ = train_once(algorithm, 0.0, vector=delta)
    assert update == [-4.6875]
    # the next Delta: -update / (lr K), the mean of the two directions, 5 and 4.375
    averages = {"update": torch.tensor(update)}
    algorithm.aggregate(averages, delta, share=0.1, step_length=0.5 * 2)
    assert delta.item() == 4.6875 == (5 + 4.375) / 2


def test_a_fixed_point_of_scaffold_has_no_drift():
    """Two clients with goals 0 and 4 and many steps: FedAvg's average of their optima, weighted by
    how fast they get there, is not the optimum of the mean loss where curvatures differ; SCAFFOLD's
    is."""
    curvatures, goals = (1.0, 0.2), (0.0, 4.0)
    optimum = sum(a * g for a, g in zip(curvatures, goals, strict=True)) / sum(curvatures)

    def train(algorithm):
        x, c, kept = torch.tensor([9.0]), torch.zeros(1), [None, None]
        for _ in range(200):
            updates, changes = [], []
            for i, (a, goal) in enumerate(zip(curvatures, goals, strict=True)):
                y = x.clone()
                local = algorithm.before(x, kept[i], c, None)
                for _ in range(10):
                    gradient = a * (y - goal)
                    local.correct_gradient(y, gradient)
                    y = y - 0.1 * gradient
                updates.append(y - x)
                change = local.after_training(updates[-1], step_length(0.1, 10))
                if change is not None:
                    changes.append(change)
                    kept[i] = local.after_sending(kept[i], {"control": arrive(change)})
            averages = {"update": sum(updates) / 2}
            if changes:
                averages["control"] = sum(changes) / 2
            algorithm.aggregate(averages, c, 1.0, 1.0)
            x = x + averages["update"]
        return x.item()

    assert train(SCAFFOLD()) == pytest.approx(optimum, abs=1e-5)
    assert abs(train(FedAvg()) - optimum) > 0.1


# --- identities in whole rounds -------------------------------------------------------------------

NEUTRAL = {
    "FedProx": ["local.algorithm=FedProx", "local.options.mu=0"],
    "FedNova": ["local.algorithm=FedNova"],
    "FedDyn": ["local.algorithm=FedDyn", "local.options.alpha=0"],
    "FedCM": ["local.algorithm=FedCM", "local.options.alpha=1"],
}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", NEUTRAL)
def test_at_its_neutral_setting_each_is_fedavg(tmp_path, name, momentum):
    shared = [f"local.momentum={momentum}", "local.clip=1", "server.optimizer=FedYogi"]
    ends = []
    for label, extra in (("fedavg", []), (name, NEUTRAL[name])):
        one = make_plain_federation(tmp_path, *shared, *extra, name=label)
        for _ in range(3):
            one.run_round()
        ends.append(one.server.parameters.detach())
    if name == "FedNova":  # divides and multiplies by one number
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(ends[1], ends[0])


def test_scaffold_with_controls_of_zero_is_fedavg(tmp_path):
    """In the first round c and c_i are zero."""
    plain, scaffold = (
        make_plain_federation(tmp_path, f"local.algorithm={name}", name=name)
        for name in ("FedAvg", "SCAFFOLD")
    )
    plain.run_round()
    scaffold.run_round()
    assert torch.equal(plain.server.parameters, scaffold.server.parameters)
    plain.run_round()
    scaffold.run_round()
    assert not torch.equal(plain.server.parameters, scaffold.server.parameters)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("values", ["fp32", "topk int8"])
@pytest.mark.parametrize("downlink", ["model", "change", "dynamic mask"])
def test_scaffolds_c_is_the_average_of_what_clients_hold(tmp_path, weighting, values, downlink):
    """c = sum of w_i c_i, whatever compression loses, whoever took part."""
    mode = "change" if downlink == "change" else "model"
    more = [f"server.weighting={weighting}", f"downlink.mode={mode}", "local.lr=0.01"]
    more += ["data.partition.name=dirichlet", "clients.per_round=2"]
    more += ["data.partition.args={alpha: 0.5, min_partition_size: 2}"]
    if values == "topk int8":
        more += ["pruning.method=topk", "pruning.density=0.1", "uplink.values=int8"]
        more += ["uplink.error_feedback=true"]
    if downlink == "dynamic mask":
        more += ["pruning.mask.method=dynamic", "pruning.mask.every=1"]
        more += ["pruning.mask.density=0.3", "pruning.mask.share=0.5", "rounds=100"]
    if downlink == "change":
        more += ["downlink.pruning.method=topk", "downlink.pruning.density=0.2"]
    one = make_plain_federation(tmp_path, "local.algorithm=SCAFFOLD", *more)
    for _ in range(5):
        one.run_round()
    sizes = np.array([len(indices) for indices in one.shards], float)
    weights = sizes / sizes.sum() if weighting == "examples" else np.full(4, 1 / 4)
    one.clients.receive(one.server.broadcast(6, [0]), 6)  # brings the last change of the mask
    held = [one.clients.store.get(client).get("algorithm") for client in range(4)]
    expected = sum(w * c for w, c in zip(weights, held, strict=True) if c is not None)
    torch.testing.assert_close(one.server.vector, expected.float(), rtol=1e-4, atol=1e-6)
    assert one.server.vector.any()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_order_of_clients_does_not_matter(tmp_path, monkeypatch, name):
    """Reports that arrive in another order give the same step, up to the order of sums."""
    ends = []
    for label, backwards in (("there", False), ("back", True)):
        one = make_plain_federation(tmp_path, f"local.algorithm={name}", name=label)
        if backwards:
            monkeypatch.setattr(Synchronous, "_own", lambda self, cohort: cohort[::-1])
        for _ in range(2):
            one.run_round()
        ends.append(one.server.parameters.detach())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_fedexp_steps_by_the_norms_of_what_arrived(tmp_path, monkeypatch, weighting):
    """lr = max(1, mean ||Delta_i||^2 / (2 (||mean Delta||^2 + eps))), recomputed from payloads."""
    words = ["server.optimizer=FedExP", "server.options.eps=1e-9", f"server.weighting={weighting}"]
    words += ["data.partition.name=pathological", "clients.per_round=4", "uplink.values=fp16"]
    words += ["data.partition.args={num_classes_per_partition: 2}", "local.steps=20"]
    one, updates, weights = make_plain_federation(tmp_path, *words), [], []
    channel, decode = one.server.agreement.channel("up", "update"), Average.decode

    def decode_and_note(self, report, round_number):
        [message] = report.messages
        decoded = channel.decode(message.payload, round_number, report.client)
        updates.append(decoded.dense().double())
        weights.append(report.num_examples if weighting == "examples" else 1)
        return decode(self, report, round_number)

    monkeypatch.setattr(Average, "decode", decode_and_note)
    before = one.server.parameters.detach().clone()
    one.run_round()
    mean = sum(w * u for w, u in zip(weights, updates, strict=True)) / sum(weights)
    norms = sum(w * float(u @ u) for w, u in zip(weights, updates, strict=True)) / sum(weights)
    lr = max(1.0, norms / (2 * (float(mean @ mean) + 1e-9)))
    assert one.server.optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-4)
    moved = (one.server.parameters.detach() - before).double()
    torch.testing.assert_close(moved, lr * mean, rtol=1e-3, atol=1e-6)


# --- what travels and what is kept ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("FedAvg", set()),
        ("FedProx", set()),
        ("FedNova", set()),
        ("FedDyn", set()),
        ("FedCM", {("down", "momentum")}),
        ("SCAFFOLD", {("down", "control"), ("up", "control")}),
    ],
)
def test_the_ledger_has_what_an_algorithm_sends_besides(tmp_path, name, extra):
    one = make_plain_federation(tmp_path, f"local.algorithm={name}")
    row, messages = one.run_round()
    assert kinds(messages) == {("down", "model"), ("up", "update")} | extra
    directions = {"up": 0, "down": 0}
    for message in messages:
        directions[message.direction] += message.bytes
        assert message.dense_bytes == 4 * one.model.layout.size
    assert directions == {"up": row["bytes_up"], "down": row["bytes_down"]}


CODECS = {
    "topk": ["pruning.method=topk", "uplink.values=int8", "uplink.error_feedback=true"],
    "eden in bf16": ["uplink.values=eden2", "precision=bf16"],
    "random in fp16": ["pruning.method=random", "pruning.density=0.2", "precision=fp16"],
    "dynamic mask": [
        *("pruning.mask.method=dynamic", "pruning.mask.density=0.3", "pruning.mask.every=2"),
        *("downlink.mode=change", "downlink.values=qsgd4"),
    ],
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_works_with_codecs_masks_precisions_and_clipping(tmp_path, name, codec):
    words = [f"local.algorithm={name}", *CODECS[codec], "local.clip=1"]
    words += ["uplink.error_feedback=false"] if name == "FedDyn" else []
    one = make_plain_federation(tmp_path, *words)
    before = one.server.parameters.detach().clone()
    for _ in range(3):
        assert one.run_round()[0]["num_failed"] == 0
    assert torch.isfinite(one.server.parameters).all()
    assert not torch.equal(before, one.server.parameters)
    if one.server.pruned is not None:
        assert not one.server.parameters[one.server.pruned].any()


@pytest.mark.parametrize("name", ["SCAFFOLD", "FedDyn", "FedCM"])
def test_a_refused_payload_leaves_the_state_as_it_was(tmp_path, monkeypatch, name):
    one = make_plain_federation(tmp_path, f"local.algorithm={name}", "clients.per_round=4")
    one.run_round()
    kept = one.clients.store.get
    before = {c: {k: t.clone() for k, t in kept(c).items()} for c in range(4)}
    damage_first(monkeypatch)
    assert one.run_round()[0]["num_failed"] == 1
    for number in range(4):
        for key, tensor in kept(number).items():
            assert torch.equal(tensor, before[number][key]) == (number == 0)


NORMS = ["model.name=resnet18", "model.width=0.0625", "model.norm_policy=local"]


@pytest.mark.parametrize(
    "words",
    [
        ["local.algorithm=SCAFFOLD"],
        ["local.algorithm=FedDyn", "uplink.error_feedback=false"],
        ["local.algorithm=FedCM"],
        NORMS,
    ],
    ids=["SCAFFOLD", "FedDyn", "FedCM", "FedBN"],
)
def test_an_interrupted_run_ends_with_the_same_model(run, monkeypatch, words):
    words = [*words, "checkpoint.every=1"]
    _, whole = run(*words, name="whole")
    original, calls = client.train_client, []

    class Killed(BaseException):
        pass

    def train(*args):
        calls.append(1)
        if len(calls) == 8:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(client, "train_client", train)
        with pytest.raises(Killed):
            run(*words, name="killed")
    assert run(*words, name="killed")[0] == 0
    killed = whole.parent / "killed-s1"
    assert summary(killed)["model_sha256"] == summary(whole)["model_sha256"]
    assert (killed / "ledger.csv").read_text() == (whole / "ledger.csv").read_text()
