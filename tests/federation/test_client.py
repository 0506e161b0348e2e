"""client.py: a client that has only the messages, encoding on threads, and what is kept."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.dispatch import NoWaiting
from helpers.runs import PLAIN, kinds, make_federation, make_plain_federation

from algorithms import ALGORITHMS, step_length
from compression import OVERHEAD
from distributed import Team
from federation.agreement import Agreement
from federation.cohort import sample_cohort
from federation.messages import Broadcast
from federation.server import Average
from federation.setup import build_model
from pruning import sparse_gains
from training import engines, local_sgd
from training.engines import TorchEngine
from training.local_sgd import batch_sizes, local_lr, loss_gradient, train_client
from wire.container import MEMORY_CHUNK


def test_error_feedback_conserves_what_clients_learned(tmp_path):
    """What the server gets plus what is still owed is what was learned, to the last bit."""
    one = make_federation(tmp_path, "clients.total=1", "clients.per_round=1")
    received = one.server.parameters.detach().clone()
    [trained] = one.clients.train([0], 1, one.server.broadcast(1, [0]))
    learned = one.model.read_parameters() - received
    [message] = one.clients.uplink.encode(trained, 1).messages
    sent = one.server.agreement.channel("up", "update").decode(message.payload, 1, 0).dense()
    residual = one.clients.store.get_staged(0)["residual"]
    assert torch.equal(sent + residual, learned)
    assert 0 < message.num_values < 0.06 * len(learned)


def test_an_optimizer_goes_on_in_a_clients_next_round_from_memory_or_disk(tmp_path):
    """Its count of steps goes on, and models agree wherever the states were kept."""
    ends = {}
    for name, words in {
        "kept": ["local.optimizer_state=kept"],
        "disk": ["local.optimizer_state=kept", "clients.state_memory_gib=1e-9"],
        "fresh": [],
    }.items():
        more = ["local.optimizer=AdamW", "local.steps=2", "clients.total=2", "clients.per_round=2"]
        federation = make_federation(tmp_path, *more, *words, name=name)
        for _ in range(3):
            federation.run_round()
        state = federation.clients.store.get(1)
        counts = {float(state[key]) for key in state if key.endswith(".step")}
        assert counts == (set() if name == "fresh" else {6.0})
        assert "residual" in state
        ends[name] = federation.server.parameters.detach().clone()
    assert torch.equal(ends["kept"], ends["disk"])
    assert not torch.equal(ends["kept"], ends["fresh"])


# --- a client that has only the messages ----------------------------------------------------------


class RemoteClient:
    """A client elsewhere: it has its pictures and the config, and sees nothing but its messages."""

    def __init__(self, config, number, pictures, indices):
        self.config, self.number, self.pictures, self.indices = config, number, pictures, indices
        self.model = build_model(config, pictures, torch.device("cpu"))
        self.agreement = Agreement(config, self.model.layout, self.model.buffer_layout)
        self.engine = TorchEngine(self.model, config.local, "fp32", Team())
        self.received: dict[str, torch.Tensor] = {"buffers": self.model.read_buffers().clone()}
        if config.downlink.mode != "model":  # the first vectors need no message
            down = self.agreement.algorithm.down
            self.received |= {"model": self.first_weights(), down: torch.zeros(self.size)}
        self.owed = self.kept = None

    @property
    def size(self):
        return self.model.layout.size

    def first_weights(self):
        weights, mask = self.model.read_parameters().clone(), self.agreement.mask
        if mask.kept is not None:
            weights *= sparse_gains(mask.kept, self.model.layout.shapes)
            weights[mask.pruned] = 0
        return weights

    def take_part(self, round_number, messages):
        """Answer the payloads of one round, by kind and in order: [(kind, bytes)]."""
        for kind, payload in messages:
            self.receive(kind, payload, round_number)
        update, besides, after_sending = self.train(round_number)
        answers = []
        if self.agreement.sends_buffers:
            answers.append(self.encode("buffers", self.model.read_buffers(), round_number)[0])
        if self.agreement.mask.grows_in(round_number):
            answers.append(self.answer_growth(round_number))
        if self.config.uplink.error_feedback and self.owed is not None:
            update += self.owed
        answer, sent = self.encode("update", update, round_number)
        answers.append(answer)
        if self.config.uplink.error_feedback:
            self.owed = update - sent.dense()
        arrived = {"update": sent}
        if besides is not None:
            kind = self.agreement.algorithm.up
            answer, arrived[kind] = self.encode(kind, besides, round_number)
            answers.append(answer)
        self.kept = after_sending(self.kept, arrived)
        return answers

    def receive(self, kind, payload, round_number):
        channel = self.agreement.channel("down", kind)
        if kind in ("mask", "mask_change"):
            kept = channel.decode(payload)
            if kind == "mask_change":
                kept = np.setxor1d(self.agreement.mask.positions(), kept)
            left = self.agreement.use_mask(kept)
            vectors = (self.received.get("model"), self.owed)
            for vector in (some for some in vectors if some is not None):
                vector[left] = 0
        elif kind.endswith("_change"):
            own = (self.number,) if self.config.downlink.mode == "copies" else ()
            change = channel.decode(payload, round_number, *own)
            change.add_to(self.received[kind[: -len("_change")]])
        else:
            self.received[kind] = channel.decode(payload, round_number).dense()

    def train(self, round_number):
        model, local, algorithm = self.model, self.config.local, self.agreement.algorithm
        weights, pruned = self.received["model"], self.agreement.mask.pruned
        kept = None if self.kept is None else model.aligned(self.kept)
        vector = model.aligned(self.received[algorithm.down]) if algorithm.down else None
        model.load(weights, self.received["buffers"])
        part = algorithm.before(model.aligned(weights), kept, vector, None)

        def correct_gradient(weights, gradient):
            part.correct_gradient(weights, gradient)
            if pruned is not None:
                gradient[model.aligned(pruned)] = 0

        lr = local_lr(local, round_number, self.config.rounds)
        seed = self.config.seed_for("training", round_number, self.number)
        train_client(
            self.engine,
            self.pictures,
            self.indices,
            local,
            lr,
            seed,
            correct_gradient=correct_gradient,
        )
        update = model.aligned(model.read_parameters() - weights)
        length = step_length(lr, len(batch_sizes(local, len(self.indices))), local.momentum)
        besides = part.after_training(update, length)
        besides = None if besides is None else model.compact(besides)
        return model.compact(update).clone(), besides, part.after_sending

    def answer_growth(self, round_number):
        mask, local = self.config.pruning.mask, self.config.local
        self.model.load(self.received["model"], self.received["buffers"])
        gradient = loss_gradient(
            self.model,
            self.pictures,
            self.indices,
            replace(local, epochs=1, steps=mask.batches),
            self.config.seed_for("mask", round_number, self.number),
        )
        gradient = self.model.compact(gradient)
        candidates = self.agreement.mask.growth_candidates(gradient, round_number)
        return self.encode("growth", gradient, round_number, lambda *_: candidates)[0]

    def encode(self, kind, vector, round_number, select=None):
        channel = self.agreement.channel("up", kind)
        payload, sent = channel.encode(vector, round_number, self.number, select=select)
        return (kind, bytes(payload)), sent


MASK = ["pruning.mask.method=dynamic", "pruning.mask.density=0.3", "pruning.mask.every=1"]
TOP_K = ["pruning.method=topk", "pruning.density=0.1", "uplink.values=int8"]
ALL = ["clients.total=3", "clients.per_round=3", "uplink.error_feedback=true"]
NOTHING_OWED = "uplink.error_feedback=false"
SOME = ["clients.total=5", "clients.per_round=2", NOTHING_OWED]
COPIES = ["downlink.mode=copies", "downlink.pruning.method=topk", "downlink.pruning.density=0.2"]
RESNET = ["model.name=resnet18", "model.width=0.0625"]
REMOTE = {
    "FedAvg": ["local.algorithm=FedAvg", *TOP_K, *MASK, *ALL],
    "SCAFFOLD": ["local.algorithm=SCAFFOLD", *TOP_K, *MASK, *ALL],
    "FedDyn, buffers": ["local.algorithm=FedDyn", *TOP_K, *MASK, *ALL, NOTHING_OWED, *RESNET],
    "FedCM, changes": ["local.algorithm=FedCM", *TOP_K, *MASK, *ALL, "downlink.mode=change"],
    "random, some": ["pruning.method=random", "uplink.values=eden2", *MASK, *SOME],
    "SCAFFOLD, some": ["local.algorithm=SCAFFOLD", *TOP_K, *SOME, "downlink.mode=change"],
    "FedAvg, some have copies": [*TOP_K, *MASK, *SOME, *COPIES],
    "random copies": [*TOP_K, *SOME, *COPIES, "downlink.pruning.method=random"],
    "FedAvg, some owe": [*TOP_K, *MASK, *SOME, "uplink.error_feedback=true"],
}


@pytest.mark.parametrize("case", REMOTE)
def test_a_client_that_has_only_the_messages_answers_byte_by_byte_the_same(
    tmp_path, monkeypatch, case
):
    told, answered = {}, {}
    of, decode = Broadcast.of, Average.decode

    def payloads(messages):
        return [(message.kind, bytes(message.payload)) for message in messages]

    def bring_and_note(self, client, copy=None):
        sent = of(self, client, copy)
        told[client] = payloads(sent.messages[client])
        return sent

    def note_and_decode(self, report, round_number):
        answered[report.client] = payloads(report.messages)
        return decode(self, report, round_number)

    monkeypatch.setattr(Broadcast, "of", bring_and_note)
    monkeypatch.setattr(Average, "decode", note_and_decode)
    words = ["model.width=0.25", "downlink.values=qsgd8", "rounds=20", *REMOTE[case]]
    one = make_federation(tmp_path, *words)
    remote = [
        RemoteClient(one.config, number, one.pictures, torch.from_numpy(indices))
        for number, indices in enumerate(one.shards)
    ]
    kinds = set()
    for round_number in range(1, 7):
        told.clear()
        answered.clear()
        one.run_round()
        for client in sample_cohort(one.config, one.candidates, round_number):
            kinds |= {kind for kind, _ in told[client]}
            assert remote[client].take_part(round_number, told[client]) == answered[client]
    if case == "random, some":
        assert {"mask", "mask_change"} <= kinds


# --- encoding on threads --------------------------------------------------------------------------

THREADED = {
    "top-k": ["local.algorithm=SCAFFOLD", *TOP_K],
    "dense": ["local.algorithm=SCAFFOLD", "pruning.method=none", "uplink.values=fp16"],
    "momentum": [*TOP_K, "uplink.momentum=0.9", "local.momentum=0", "local.steps=1"],
}


def train_and_encode(one, round_number, cohort, pool=None):
    """The payloads of a round by client and kind, and what the clients keep, as bytes."""
    broadcast = one.server.broadcast(round_number, cohort)
    one.clients.receive(broadcast, round_number)
    waiting = []
    for client in cohort:
        [trained] = one.clients.train([client], round_number, broadcast)
        if pool is None:
            waiting.append(one.clients.uplink.encode(trained, round_number))
        else:
            waiting.append(pool.submit(one.clients.uplink.encode, trained, round_number))
    reports = waiting if pool is None else [future.result() for future in waiting]
    payloads = {r.client: [(m.kind, bytes(m.payload)) for m in r.messages] for r in reports}
    assert all(not report.failure for report in reports)
    one.clients.store.commit()
    kept = {
        client: {key: some.numpy().tobytes() for key, some in one.clients.store.get(client).items()}
        for client in cohort
    }
    return payloads, kept


@pytest.mark.parametrize("budget", [1.0, 3e-4, 1e-9], ids=["in memory", "some fit", "on the disk"])
@pytest.mark.parametrize("case", THREADED)
def test_clients_may_be_encoded_on_threads_while_others_train(
    tmp_path, many_switches, case, budget
):
    words = ["clients.total=12", "clients.per_round=12", "uplink.error_feedback=true"]
    words += ["local.batch_size=4", f"clients.state_memory_gib={budget}", *THREADED[case]]
    alone, threaded = (make_federation(tmp_path, *words, name=name) for name in ("one", "many"))
    with ThreadPoolExecutor(4) as pool:
        for round_number in (1, 2, 3):
            expected = train_and_encode(alone, round_number, list(range(12)))
            assert train_and_encode(threaded, round_number, list(range(12)), pool) == expected


# --- memory ---------------------------------------------------------------------------------------


def test_a_rank_keeps_the_payloads_of_one_client_at_a_time(tmp_path, monkeypatch):
    """64 dense clients of a million parameters: 256 MB if all of them were kept."""
    words = ["model.width=7", "clients.total=64", "clients.per_round=64", "local.steps=1"]
    words += ["local.batch_size=2", "pruning.method=none", "uplink.values=fp32"]
    words += ["uplink.error_feedback=false", "server.optimizer=FedAvg", "evaluation.every=9"]
    one, averages, in_use = make_federation(tmp_path, *words), [], []
    assert one.model.layout.size > 0.99e6
    [payload_memory], step = one.pipeline.memories, one.server.step
    take = payload_memory.take

    def take_and_note(size):
        memory = take(size)
        in_use.append(payload_memory.chunk * MEMORY_CHUNK + payload_memory.used)
        return memory

    monkeypatch.setattr(payload_memory, "take", take_and_note)
    one.server.step = lambda average, *rest: averages.append(average) or step(average, *rest)
    one.run_round()
    [average] = averages
    assert len(average.reports) == 64 <= len(in_use)
    assert 0 < max(in_use) - 4 * one.model.layout.size - OVERHEAD < 64  # a cache line
    assert sum(map(len, payload_memory.chunks)) == MEMORY_CHUNK
    assert all(m.payload is None for report in average.reports for m in report.messages)


# --- norm layers ----------------------------------------------------------------------------------

NORMS = ["model.name=resnet18", "model.width=0.0625", "local.batch_size=8"]


def test_frozen_statistics_never_change_nor_travel(tmp_path):
    one = make_plain_federation(tmp_path, *NORMS, "model.norm_policy=frozen")
    before = one.server.buffers.clone()
    weights = one.server.parameters.detach().clone()
    _, rows = one.run_round()
    assert torch.equal(one.server.buffers, before) and torch.equal(one.model.read_buffers(), before)
    assert not torch.equal(one.server.parameters, weights)
    assert kinds(rows) == {("down", "model"), ("up", "update")}


def test_frozen_statistics_are_those_of_training(tmp_path):
    """The loss of a training batch is that of the network in evaluation."""
    one = make_plain_federation(tmp_path, *NORMS, "model.norm_policy=frozen")
    one.model.train()
    images, _ = one.pictures.evaluation_batch("test", 0, 8)
    trained = one.model.network(images)
    assert torch.equal(trained, one.model.network.eval()(images))


def test_local_norm_layers_stay_with_their_client(tmp_path):
    one = make_plain_federation(tmp_path, *NORMS, "model.norm_policy=local", "clients.per_round=4")
    own = one.clients.own_positions
    norms = one.server.parameters.detach()[own].clone()
    received = []
    load = one.clients.load
    one.clients.load = lambda p, b, s=None: (
        load(p, b, s)
        or received.append(torch.cat([one.model.read_parameters()[own], one.model.read_buffers()]))
    )
    rows = [row for _ in range(2) for row in one.run_round()[1]]
    assert torch.equal(one.server.parameters.detach()[own], norms)  # the server's never move
    assert kinds(rows) == {("down", "model"), ("up", "update")}
    held = [one.clients.store.get(client)["norm"] for client in range(4)]
    assert len({tensor.numpy().tobytes() for tensor in held}) == 4  # each its own
    evaluated = received[-4:]  # the last evaluation loads the four models
    assert all(torch.equal(a, b) for a, b in zip(evaluated, held, strict=True))
    assert all((tensor[len(own) :][one.model.is_variance] > 0).all() for tensor in held)


def test_the_accuracy_with_local_norm_layers_is_the_mean_of_the_cohorts_models(tmp_path):
    one = make_plain_federation(tmp_path, *NORMS, "model.norm_policy=local")
    row, _ = one.run_round()
    cohort = sample_cohort(one.config, one.candidates, 1)
    accuracies = []
    for state in map(one.clients.store.get, cohort):
        one.clients.load(one.server.parameters.detach(), one.server.buffers, state)
        images, labels = one.pictures.evaluation_batch("test", 0, 360)
        with torch.no_grad():
            right = one.model.network.eval()(images).argmax(1) == labels
        accuracies.append(float(right.float().mean()))
    assert row["test_accuracy"] == pytest.approx(np.mean(accuracies))


def hold_still(monkeypatch, positions):
    """From now on the weights at these positions, bool [num_parameters], have no gradient."""

    def train(*args):
        *rest, correct = args

        def correct_gradient(weights, gradient):
            if correct:
                correct(weights, gradient)
            gradient.masked_fill_(positions, 0.0)

        return original(*rest, correct_gradient)

    original = local_sgd.train_client
    monkeypatch.setattr("federation.client.train_client", train)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_algorithm_reaches_into_local_norm_layers(tmp_path, monkeypatch, name):
    """Nothing of them is sent, and with all else held still they train as FedAvg's do."""
    words = [*NORMS, "model.norm_policy=local", "clients.per_round=4", "local.lr=0.01"]
    norms = []
    for algorithm in ("FedAvg", name):
        one = make_plain_federation(
            tmp_path, *words, f"local.algorithm={algorithm}", name=f"run{len(norms)}"
        )
        own = one.clients.own_positions
        others = torch.ones(one.model.layout.size, dtype=torch.bool)
        others[own] = False
        hold_still(monkeypatch, others)
        for _ in range(3):
            one.run_round()
        assert one.server.vector is None or not one.server.vector[own].any()
        norms.append([one.clients.store.get(client)["norm"] for client in range(4)])
    for ours, plain in zip(*norms, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("how", ["no examples", "not finite"])
def test_local_norm_layers_of_a_client_that_has_kept_nothing(tmp_path, monkeypatch, how):
    one = make_plain_federation(tmp_path, *NORMS, "model.norm_policy=local", "clients.per_round=4")
    if how == "no examples":
        one.clients.pictures_of[2] = one.clients.pictures_of[2][:0]
    else:
        monkeypatch.setattr(
            "federation.client.train_client",
            lambda e, *_: (e.model.parameters.fill_(np.nan), (0.0, 0))[1],
        )
    row, _ = one.run_round()
    assert row["num_failed"] == (1 if how == "no examples" else 4)
    assert 0 <= row["test_accuracy"] <= 1


def test_a_finished_run_keeps_its_clients_norm_layers(run):
    _, folder = run(*NORMS, "model.norm_policy=local")
    states = list((folder / "clients").glob("*.pt"))
    assert len(states) == 4
    assert all("norm" in torch.load(path, weights_only=True) for path in states)


@pytest.mark.parametrize(
    "words",
    [
        ["local.algorithm=SCAFFOLD"],
        ["local.algorithm=FedProx", "local.logit_adjustment=1"],
        ["local.algorithm=FedProx", "pruning.mask.method=dynamic", "pruning.mask.density=0.3"],
        ["model.name=resnet18", "model.width=0.125", "local.lr=0.002"],
        [*NORMS, "model.norm_policy=local", "local.lr=0.002"],
        ["model.name=cnn", *PLAIN],
    ],
)
def test_clients_in_lanes_learn_what_they_learn_one_by_one(tmp_path, words):
    learned = []
    for lanes in (1, 2, 3):
        one = make_federation(tmp_path, *words, f"local.lanes={lanes}", name=f"lanes{lanes}")
        clients, broadcast = one.clients, one.server.broadcast(1, [0, 1, 3])
        clients.receive(broadcast, 1)
        clients.pictures_of[0] = clients.pictures_of[0][:0]
        done = {}
        with NoWaiting():  # for the device of training
            for update in clients.train([0, 1, 3], 1, broadcast):
                is_missing = update.report.failure == "it has no examples"
                assert is_missing == (update.report.client == 0) == (update.update is None)
                vectors = (update.update, update.buffers, update.norm, update.besides)
                done[update.report.client] = [None if v is None else v.clone() for v in vectors]
        learned.append(done)
    for other in learned[1:]:
        for client, vectors in learned[0].items():
            for alone, together in zip(vectors, other[client], strict=True):
                assert (alone is None) == (together is None)
                if alone is not None:
                    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# --- logit adjustment -----------------------------------------------------------------------------


def test_an_adjusted_client_learns_what_a_loss_of_adjusted_logits_teaches(tmp_path, monkeypatch):
    """Against cross entropy of logits + log shares, which leaves the biases as they are."""
    words = [*PLAIN, "local.weight_decay=0", "local.momentum=0.9", "local.lanes=1"]
    words += ["local.algorithm=FedProx", "local.options.mu=0.5"]  # its anchor moves along
    ours = make_federation(tmp_path, *words, "local.logit_adjustment=0.7", name="ours")
    plain = make_federation(tmp_path, *words, name="plain")
    loss = engines.cross_entropy
    for client in (0, 2):
        labels = ours.pictures.train_labels[ours.clients.pictures_of[client]].tolist()
        shares = [(labels.count(c) + 1) / (len(labels) + 10) for c in range(10)]
        logs = torch.tensor(shares, dtype=torch.float64).log().mul(0.7).float()

        def train(one, client=client):
            [trained] = one.clients.train([client], 1, one.server.broadcast(1, [client]))
            return trained.update.clone()

        unadjusted, adjusted = train(plain), train(ours)
        with monkeypatch.context() as patch:
            patch.setattr(engines, "cross_entropy", lambda x, y, a=logs: loss(x + a, y))
            expected = train(plain)
        torch.testing.assert_close(adjusted, expected, rtol=1e-4, atol=2e-6)
        assert (unadjusted - adjusted).norm() > 0.1 * adjusted.norm()


def test_without_adjustment_the_received_model_is_not_copied(tmp_path):
    one = make_federation(tmp_path, *PLAIN)
    broadcast = one.server.broadcast(1, [0])
    [trained] = one.clients.train([0], 1, broadcast)
    assert trained.received.data_ptr() == broadcast.parameters.data_ptr()
