"""graphs.py and graph_engine.py with stand-ins for a CUDA graph, on a CPU."""

from dataclasses import replace

import pytest
import torch
from helpers.dispatch import Addresses, NoWaiting
from helpers.noise import CPU, flat_model, make_pictures

from algorithms import LocalRound, SCAFFOLDRound
from config import Local
from distributed import Team
from training.correction import Correction
from training.engines import TorchEngine
from training.graph_engine import GraphEngine, make_engine
from training.graphs import Graphs, recorder
from training.lanes import Job, Lanes
from training.local_sgd import train_client

PICTURES = make_pictures(padding=1, flip=True)
LOCAL = Local(epochs=2, batch_size=8, lr=0.1, momentum=0.9, weight_decay=5e-4, clip=0.5)
CLIENTS = [range(0, 22), range(20, 41), range(5, 30)]  # batches of 8 and 6, 5, 9


class StandIn:
    """Records a step as a CUDA graph does: runs it some times, then replays the same closure.

    Attribute `touched`: for each recording, the outside addresses of each replay.
    """

    def __init__(self):
        self.touched: list[list[set[int]]] = []

    def __call__(self, step):
        for _ in range(4):
            step()
        replays: list[set[int]] = []
        self.touched.append(replays)

        def replay():
            with Addresses() as mode:
                result = step()
            replays.append(mode.outside)
            return result

        return replay


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


def test_recording_leaves_the_state_as_it_was():
    state = torch.zeros(2)

    def step():
        state.add_(1.0)
        return state.sum()

    graphs = Graphs([state], StandIn())
    assert [float(graphs.run("key", step)) for _ in range(3)] == [2.0, 4.0, 6.0]
    assert float(graphs.run("key", lambda: None)) == 8.0  # the step that was recorded
    assert float(graphs.run("other", step)) == 10.0


def test_a_cpu_and_fp16_and_teams_train_eagerly():
    assert recorder(CPU)(print) is print
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
    own = torch.tensor([3, 4])
    correction = Correction(LocalRound(), own, torch.zeros_like(model.parameters).bool())
    jobs = [
        Job(torch.tensor(shard), 0.01, 1, model.parameters, model.buffers, correction)
        for shard in CLIENTS
    ]
    with NoWaiting():
        lanes.train(jobs)


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
    ],
)
def test_the_mode_sees_who_waits(wait):
    with pytest.raises(AssertionError), NoWaiting():
        wait(torch.ones(3))
