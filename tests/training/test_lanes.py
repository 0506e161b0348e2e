"""lanes.py: clients that train together end as clients that train one by one."""

from dataclasses import replace

import pytest
import torch
from helpers.dispatch import StandIn
from helpers.noise import CPU, make_pictures

from algorithms import FedAvg, FedProx, LocalRound, SCAFFOLDRound
from cnn_model import build_network
from config import ConfigError, Local
from distributed import Team
from training.correction import Correction
from training.engines import TorchEngine
from training.flat_model import FlatModel
from training.lanes import Job, Lanes, group_by_steps, norms_in_fp32
from training.local_sgd import Interrupted, batch_sizes, train_client

PICTURES = make_pictures(padding=1, flip=True)
LOCAL = Local(epochs=2, batch_size=8, lr=0.1, momentum=0.9, weight_decay=5e-4, clip=0.5)
PLAIN = Local(epochs=2, batch_size=8, lr=0.1, momentum=0.0, weight_decay=0.0)
# batches of 8; of 8, 8, 6; of 9, which one joins; of 5 alone; of 8, 8, 8, 4
SHARDS = [range(0, 16), range(20, 42), range(3, 12), range(30, 35), range(10, 38)]


def model_of(name: str, norm: str = "batch", frozen: bool = False) -> FlatModel:
    return FlatModel(build_network(name, 3, (8, 8), 0, norm=norm, width=0.125), CPU, frozen)


def make_jobs(model: FlatModel, shards=SHARDS, corrections=None) -> list[Job]:
    """A client for each shard, each with weights, buffers and a learning rate of its own."""
    jobs = []
    for client, shard in enumerate(shards):
        vectors = model.parameters * (1 + 0.01 * client), model.buffers * (1 + 0.01 * client)
        correction = corrections[client] if corrections else None
        # A low rate, so that BatchNorm on few values does not blow up what rounding has changed.
        lr, seed = 0.002 / (client + 1), 2**62 + client
        jobs.append(Job(torch.tensor(shard), lr, seed, *vectors, correction))
    return jobs


def one_by_one(model: FlatModel, local: Local, jobs: list[Job]) -> list[list[torch.Tensor]]:
    engine, ends = TorchEngine(model, local, "fp32", Team()), []
    for job in jobs:
        model.parameters.copy_(job.parameters)
        model.buffers.copy_(job.buffers)
        loss, _ = train_client(
            engine,
            PICTURES,
            job.indices,
            local,
            job.lr,
            job.seed,
            correct_gradient=job.correction,
        )
        ends.append([model.parameters.clone(), model.buffers.clone(), loss])
    return ends


def in_lanes(model: FlatModel, local: Local, jobs: list[Job], num_lanes: int):
    return results(Lanes(model, PICTURES, local, "fp32", num_lanes), jobs)


def results(lanes: Lanes, jobs: list[Job]) -> list[list[torch.Tensor]]:
    done = lanes.train(jobs)
    assert all(trained.num_skipped == 0 for trained in done)
    return [[t.parameters.clone(), t.buffers.clone(), t.loss] for t in done]


def check_equal_to_one_by_one(model, local, jobs, num_lanes=6) -> None:
    expected = one_by_one(model, local, jobs)
    found = in_lanes(model, local, jobs, num_lanes)
    assert len(found) == len(expected)
    for ours, theirs, job in zip(found, expected, jobs, strict=True):
        assert not torch.equal(ours[0], job.parameters)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


NETWORKS = [("cnn", "batch"), ("lenet", "batch"), ("resnet18", "batch"), ("resnet18", "group(2)")]


@pytest.mark.parametrize(("name", "norm"), NETWORKS)
@pytest.mark.parametrize("local", [PLAIN, LOCAL, replace(LOCAL, nesterov=True, steps=5)])
def test_lanes_equal_one_by_one(name, norm, local):
    """Dropout, BatchNorm's statistics, GroupNorm; unequal shards and partial batches."""
    model = model_of(name, norm)
    check_equal_to_one_by_one(model, local, make_jobs(model))


@pytest.mark.parametrize("length", [16, 20])
@pytest.mark.parametrize("norm", ["batch", "group(2)"])
def test_lanes_that_all_take_a_step_equal_one_by_one(norm, length):
    """Equal shards of whole batches, and with a smaller one at the end; three in three lanes."""
    model = model_of("resnet18", norm)
    shards = [range(start, start + length) for start in (0, 9, 20)]
    check_equal_to_one_by_one(model, LOCAL, make_jobs(model, shards), num_lanes=3)
    recorded = Lanes(model, PICTURES, LOCAL, "fp32", 3, record=StandIn())
    for ours, theirs in zip(
        results(recorded, make_jobs(model, shards)),
        in_lanes(model, LOCAL, make_jobs(model, shards), 3),
        strict=True,
    ):
        assert all(map(torch.equal, ours, theirs))


def test_norm_layers_get_fp32_in_lanes():
    """CUDA's BatchNorm would fail on vmap's weights, which have the dtype of the input."""
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.GroupNorm(1, 2))
    halves = torch.randn(3, 2, 4, 4).bfloat16()
    with norms_in_fp32(network):
        assert network(halves).dtype == torch.float32
        assert torch.equal(network.eval()(halves), network(halves.float()))
    seen = []
    network[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    network(halves)
    assert seen == [torch.bfloat16]


def test_frozen_statistics_are_read_and_not_moved():
    model = model_of("resnet18", frozen=True)
    jobs = make_jobs(model)
    check_equal_to_one_by_one(model, LOCAL, jobs)
    for job, found in zip(jobs, in_lanes(model, LOCAL, jobs, 5), strict=True):
        assert torch.equal(found[1], job.buffers)


def corrections_of(name: str, model: FlatModel) -> list[Correction]:
    """One for each of SHARDS, each with vectors of its own."""
    corrections = []
    for client in range(len(SHARDS)):
        generator = torch.Generator().manual_seed(client)
        noise = [
            model.aligned(torch.randn(model.layout.size, generator=generator)) for _ in range(2)
        ]
        algorithm = {
            "FedProx": lambda n: FedProx(0.5).before(0.1 * n[0], None, None, None),
            "SCAFFOLD": lambda n: SCAFFOLDRound(0.01 * n[0], 0.01 * n[1], None),
        }.get(name, lambda n: FedAvg().before(None, None, None, None))(noise)
        pruned = noise[0] < -1 if name == "mask" else None
        own = torch.arange(5, 60) if name == "SCAFFOLD" else None  # as of FedBN
        corrections.append(Correction(algorithm, own, pruned))
    return corrections


@pytest.mark.parametrize("name", ["FedProx", "SCAFFOLD", "mask"])
@pytest.mark.parametrize("network", ["lenet", "resnet18"])
def test_corrected_lanes_equal_corrected_clients(name, network):
    model = model_of(network)
    jobs = make_jobs(model, corrections=corrections_of(name, model))
    expected = [(c.local_round, c.pruned) for c in (job.correction for job in jobs)]
    check_equal_to_one_by_one(model, LOCAL, jobs)
    assert [(c.local_round, c.pruned) for c in (job.correction for job in jobs)] == expected


def test_corrected_and_plain_clients_train_together():
    model = model_of("lenet")
    given = corrections_of("SCAFFOLD", model)
    lanes = Lanes(model, PICTURES, LOCAL, "fp32", 5)
    for corrections in ([given[0], None, *given[2:]], [None] * 5, given):
        jobs = make_jobs(model, corrections=corrections)
        expected = one_by_one(model, LOCAL, jobs)
        for ours, theirs in zip(results(lanes, jobs), expected, strict=True):
            torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "norm"), NETWORKS)
def test_a_lane_does_not_depend_on_its_companions(name, norm):
    """Equal bits in another order, beside others, beside one that diverges, and with idle lanes."""
    model = model_of(name, norm)
    jobs = make_jobs(model, corrections=corrections_of("SCAFFOLD", model))
    lanes = Lanes(model, PICTURES, LOCAL, "fp32", 5)
    expected = results(lanes, jobs)
    broken = replace(
        jobs[4], parameters=jobs[4].parameters.new_full((), torch.nan).expand_as(jobs[4].parameters)
    )
    orders = [[4, 2, 0, 3, 1], [1, 0], [3], [2, 1, 0]]
    for order in orders:
        found = results(lanes, [jobs[client] for client in order])
        for client, end in zip(order, found, strict=True):
            assert all(map(torch.equal, end, expected[client])), (order, client)
    found = results(lanes, [jobs[1], broken, jobs[0]])
    assert all(map(torch.equal, found[0], expected[1]))
    assert all(map(torch.equal, found[2], expected[0]))
    assert found[1][0].isnan().any()
    again = in_lanes(model, LOCAL, jobs, 5)  # a lane has no memory of the clients before
    assert all(all(map(torch.equal, a, b)) for a, b in zip(again, expected, strict=True))


def test_the_rows_of_lanes_start_at_multiples_of_16_bytes():
    for name in ("lenet", "resnet18"):
        lanes = Lanes(model_of(name), PICTURES, LOCAL, "fp32", 3)
        rows = lanes.weights, lanes.gradients, lanes.momentum, lanes.buffers
        for tensor in (row for matrix in rows for row in matrix):
            assert tensor.data_ptr() % 16 == 0
        for view in (*lanes.parameter_views, *lanes.gradient_views, *lanes.buffer_views):
            assert all(lane.data_ptr() % 16 == 0 for lane in view)


def test_fp16_has_no_lanes():
    with pytest.raises(ConfigError, match="local.lanes: fp16 .* set local.lanes=1"):
        Lanes(model_of("lenet"), PICTURES, LOCAL, "fp16", 2)


def test_bf16_in_lanes_is_near_fp32():
    model = model_of("lenet")
    jobs, ends = make_jobs(model), []
    for precision in ("fp32", "bf16"):
        lanes = Lanes(model, PICTURES, PLAIN, precision, 5)
        ends.append([trained.parameters.clone() for trained in lanes.train(jobs)])
    for job, full, half in zip(jobs, *ends, strict=True):
        moved = full - job.parameters
        assert 0 < (half - full).norm() < 0.1 * moved.norm()


@pytest.mark.parametrize("after", [0, 2])
def test_lanes_stop_between_two_steps(after):
    answers, model = iter([False] * after + [True]), model_of("lenet")
    with pytest.raises(Interrupted):
        Lanes(model, PICTURES, LOCAL, "fp32", 2).train(make_jobs(model)[:2], lambda: next(answers))


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "num_lanes", "expected"),
    [
        ([5, 5, 5, 5], 2, [[0, 1], [2, 3]]),
        ([1, 5, 5, 2, 5, 5, 1], 2, [[1, 2], [4, 5], [0, 6], [3]]),
        ([3, 1, 2], 2, [[0, 2], [1]]),
        ([2, 2, 2], 8, [[0, 1, 2]]),
        ([4, 0, 4], 1, [[0], [2], [1]]),
        ([], 4, []),
    ],
)
def test_groups_by_hand(num_steps, num_lanes, expected):
    assert group_by_steps(num_steps, num_lanes) == expected


def test_the_shards_of_this_file_hold_every_kind_of_batch():
    sizes = {size for shard in SHARDS for size in batch_sizes(LOCAL, len(shard))}
    assert sizes == {8, 6, 9, 5, 4} and not LocalRound.corrects
