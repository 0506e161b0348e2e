"""graph_engine.py and lanes.py with a stand-in for CUDA graphs; nobody waits for the device."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers.dispatch import NoWaiting, StandIn
from helpers.noise import flat_model, make_pictures, network

from algorithms import SCAFFOLDRound
from config import Local
from distributed import Team
from training.correction import Correction
from training.engines import TorchEngine
from training.flat_model import FlatModel
from training.graph_engine import GraphEngine, make_engine
from training.lanes import Job, Lanes
from training.local_sgd import loss_gradient, train_client

PICTURES = make_pictures(padding=1, flip=True)
LOCAL = Local(epochs=2, batch_size=8, lr=0.1, momentum=0.9, weight_decay=5e-4, clip=0.5)
CLIENTS = [range(0, 22), range(20, 41), range(5, 30)]  # batches of 8 and 6, 5, 9


def corrections(model, seed: int) -> list[Correction | None]:
    """None; then two of one kind."""
    noise = torch.randn(3, model.layout.size, generator=torch.Generator().manual_seed(seed))
    c, c_i, drawn = (model.aligned(row) for row in noise)
    return [None, *(Correction(SCAFFOLDRound(x, c_i, None), None, drawn < -1) for x in (c, -c))]


def train_all(engine, model, given) -> list[torch.Tensor]:
    start, ends = [model.parameters.clone(), model.buffers.clone()], []
    for seed, (shard, correction) in enumerate(zip(CLIENTS, given, strict=True)):
        model.parameters.copy_(start[0])
        model.buffers.copy_(start[1])
        indices, lr = torch.tensor(shard), 0.002 / (seed + 1)
        loss, skipped = train_client(
            engine, PICTURES, indices, LOCAL, lr, seed, correct_gradient=correction
        )
        assert skipped == 0
        ends.append(torch.cat([model.parameters, model.buffers, loss[None]]))
    return ends


@pytest.mark.parametrize("name", ["cnn", "lenet", "resnet18"])
@pytest.mark.parametrize("changes", [{}, dict(momentum=0.0, clip=0.0), dict(nesterov=True)])
def test_recorded_steps_equal_the_eager_engines(name, changes):
    local, model = replace(LOCAL, **changes), flat_model(name)
    given = corrections(model, 3)
    expected = train_all(TorchEngine(model, local, "fp32", Team()), model, given)
    model = flat_model(name)
    stand_in = StandIn()
    engine = GraphEngine(model, local, "fp32", Team(), stand_in)
    found = train_all(engine, model, given)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # Batches of 8 and 6 without a correction; of 8, 5, 9 with one.
    assert len(stand_in.touched) == 5
    assert [len(replays) for replays in stand_in.touched] == [4, 2, 4 + 4, 2, 2]


def test_a_step_touches_the_same_memory_for_every_client():
    model, stand_in = flat_model("resnet18"), StandIn()
    engine = GraphEngine(model, LOCAL, "fp32", Team(), stand_in)
    for seed in range(3):  # other corrections each time, whose tensors lie elsewhere
        train_all(engine, model, corrections(model, seed))
    assert len(stand_in.touched) == 5
    for replays in stand_in.touched:
        assert len(replays) >= 6 and all(touched == replays[0] for touched in replays)
        assert model.parameters.data_ptr() in replays[0]


@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_the_lanes_step_touches_the_same_memory_for_every_group(name):
    model, stand_in = flat_model(name), StandIn()
    lanes = Lanes(model, PICTURES, LOCAL, "fp32", 3, stand_in)
    plain = Lanes(model, PICTURES, LOCAL, "fp32", 3)
    for seed in range(3):
        given = corrections(model, seed)[1:]
        vectors = model.parameters + 0, model.buffers + 0
        jobs = [
            Job(torch.tensor(shard), 0.01, seed, *vectors, correction)
            for shard, correction in zip(CLIENTS, given, strict=False)
        ]
        for ours, theirs in zip(lanes.train(jobs), plain.train(jobs), strict=True):
            for field in ("parameters", "buffers", "loss"):
                assert torch.equal(getattr(ours, field), getattr(theirs, field))
    [replays] = stand_in.touched
    assert len(replays) >= 12 and all(touched == replays[0] for touched in replays)
    assert lanes.weights.data_ptr() in replays[0]


def test_what_cannot_be_recorded_runs_and_says_so_once(capsys):
    def refuse(step):
        step()  # half of the warm-up
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = flat_model("lenet")
    given = corrections(model, 3)
    expected = train_all(GraphEngine(model, LOCAL, "fp32", Team()), model, given)
    model = flat_model("lenet")
    found = train_all(GraphEngine(model, LOCAL, "fp32", Team(), refuse), model, given)
    assert all(map(torch.equal, found, expected))
    assert capsys.readouterr().err == (
        "warning: training steps run without CUDA graphs: operation not permitted when stream is "
        "capturing\n"
    )


def test_a_cpu_and_fp16_and_teams_train_eagerly():
    model = flat_model()
    assert isinstance(make_engine(model, LOCAL, "fp32", Team()), TorchEngine)
    model.device = torch.device("cuda")
    for precision, team, kind in (
        ("fp32", Team(), GraphEngine),
        ("bf16", Team(), GraphEngine),
        ("fp16", Team(), TorchEngine),
        ("fp32", Team(0, 2), TorchEngine),
    ):
        made = pick(model, precision, team)
        assert made is kind


def pick(model, precision, team) -> type:
    """Which engine make_engine() builds, without building it: there is no such device here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GraphEngine", "TorchEngine"):
            kind = {"GraphEngine": GraphEngine, "TorchEngine": TorchEngine}[name]
            patch.setattr(f"training.graph_engine.{name}", lambda *_, kind=kind: kind)
        return make_engine(model, LOCAL, precision, team)


# --- nobody waits for the device ------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TorchEngine, GraphEngine])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_a_client_trains_without_waiting_for_the_device(kind, precision, name):
    model = flat_model(name)
    engine = kind(model, LOCAL, precision, Team())
    given = corrections(model, 0)
    with NoWaiting():
        train_all(engine, model, given)


@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_lanes_train_without_waiting_for_the_device(name):
    model = flat_model(name)
    lanes = Lanes(model, PICTURES, LOCAL, "fp32", 4)
    jobs = [
        Job(torch.tensor(shard), 0.01, 1, model.parameters, model.buffers, correction)
        for shard, correction in zip(CLIENTS, corrections(model, 0), strict=True)
    ]
    with NoWaiting():
        lanes.train(jobs)


@pytest.mark.parametrize("name", ["cnn", "lenet", "resnet18"])
def test_training_on_a_device_that_holds_no_values(monkeypatch, name):
    """Tensors of torch's meta device have shapes only: who asks for a value fails."""
    meta, eager = torch.device("meta"), flat_model(name)
    for module in ("graph_engine", "lanes"):  # autocast does not know the device
        monkeypatch.setattr(f"training.{module}.autocast", lambda *_: nullcontext())
    model = FlatModel(network(name), meta)
    pictures = make_pictures(padding=1, flip=True, device=meta)
    vectors = model.parameters, model.buffers
    shards = [torch.empty(len(shard), dtype=torch.int64, device=meta) for shard in CLIENTS]
    zeros = torch.zeros_like(model.parameters)
    correction = Correction(SCAFFOLDRound(zeros, zeros, None), shards[0], zeros.bool())
    engine = GraphEngine(model, LOCAL, "fp32", Team())
    lanes = Lanes(model, pictures, LOCAL, "fp32", 4)
    with NoWaiting():
        for shard in shards:
            train_client(engine, pictures, shard, LOCAL, 0.1, 3, correct_gradient=correction)
        assert loss_gradient(model, pictures, shards[0], LOCAL, 3).shape == eager.gradients.shape
        done = lanes.train([Job(shard, 0.1, 3, *vectors, correction) for shard in shards])
    assert done[0].parameters.shape == eager.parameters.shape


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: float(x.sum()),
        lambda x: x.nonzero(),
        lambda x: bool(x[0]),
        lambda x: torch.equal(x, x + 0),
        lambda x: x.to("meta"),
        lambda x: x[x > 0],
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x + torch.ones(3, device="meta"),
    ],
)
def test_the_mode_sees_who_waits(wait):
    with pytest.raises(AssertionError), NoWaiting():
        wait(torch.ones(3))
