"""deepspeed_engine.py trains as engines.py does; run as a script, this file is the other side."""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.noise import flat_model, make_pictures
from helpers.runs import PYTHON, REPOSITORY, SCRIPTS, launch

from config import Config, Distributed, Local
from distributed import Team
from training import engines
from training.local_sgd import batch_sizes, train_client

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="DeepSpeed is for Linux only"
)
LOCAL = Local(epochs=2, batch_size=8, lr=0.1, momentum=0.9, weight_decay=5e-4, clip=0.5)
CLIENTS = {0: range(0, 22), 1: range(20, 41), 2: range(5, 30)}  # by seed; last batches are smaller


@dataclass(frozen=True)
class Case:
    network: str
    precision: str
    stage: int = 0
    ranks_per_client: int = 1
    scale_power: int = 10
    zeroed: bool = False  # a correction that takes all of the gradient away


@pytest.fixture(autouse=True)
def from_anywhere(monkeypatch):
    """The other side, a script below tests/, finds the repository's files and the helpers."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as launch() does: more round differently
    yield
    torch.set_num_threads(threads)


def lr_of(seed: int) -> float:
    return 0.1 / (seed + 1)


def expected(network: str, precision: str, scale_power: int = 10) -> dict[int, torch.Tensor]:
    """Every client's weights and norm buffers with the other engine, from the same start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "FIRST_SCALE_POWER", scale_power)
        model = flat_model(network)
        return train_clients(engines.TorchEngine(model, LOCAL, precision, Team()), CLIENTS)["ends"]


def train_clients(engine, clients, correct_gradient=None) -> dict:
    """Train each client from the same start.

    Returns their weights and norm buffers, the number of skipped steps, and how many tensors of the
    network do not start at a multiple of 16 bytes after a client.
    """
    model, pictures, ends, skipped, misaligned = engine.model, make_pictures(1, True), {}, 0, 0
    start = model.read_parameters().clone(), model.read_buffers().clone()
    for seed, indices in clients.items():
        model.load(*start)
        indices = torch.tensor(indices)
        skipped += train_client(
            engine, pictures, indices, LOCAL, lr_of(seed), seed, correct_gradient=correct_gradient
        )[1]
        ends[seed] = torch.cat([model.read_parameters(), model.read_buffers()])
        tensors = [*model.network.parameters(), *model.network.buffers()]
        misaligned += sum(tensor.data_ptr() % 16 != 0 for tensor in tensors)
        values = torch.cat([tensor.detach().flatten() for tensor in tensors])
        assert torch.equal(values, ends[seed]), "the network does not read the flat vectors"
    return {"ends": ends, "skipped": skipped, "misaligned": misaligned}


def num_batches(indices: range) -> int:
    return len(batch_sizes(LOCAL, len(indices)))


def trained(tmp_path_factory, cases: list[Case], *launcher: str) -> list[list[dict]]:
    """For each rank, what it saved for each case."""
    folder = tmp_path_factory.mktemp("ranks")
    words = [str(folder), json.dumps([vars(case) for case in cases])]
    done = launch(*(launcher or (PYTHON,)), __file__, *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [torch.load(path) for path in sorted(folder.glob("rank*.pt"))]


def two_ranks(name: str) -> tuple[str, ...]:
    count = {"torchrun": "--nproc_per_node", "deepspeed": "--num_gpus"}[name]
    return (str(SCRIPTS / name), count, "2", "--master_port", str(20000 + os.getpid() % 20000))


ALONE = [Case("resnet18", precision) for precision in ("fp32", "bf16", "fp16")]
OVERFLOWS = [Case("lenet", "fp16", stage, scale_power=22) for stage in (0, 1, 2)]
ZEROED = [Case("lenet", "fp16", stage, zeroed=True) for stage in (0, 1, 2)]
TOGETHER = [Case("lenet", "fp32", stage, ranks_per_client=2) for stage in (0, 1, 2)]


def test_one_rank(tmp_path_factory):
    (results,) = trained(tmp_path_factory, [*ALONE, *OVERFLOWS, *ZEROED])
    assert [result["misaligned"] for result in results] == [0] * len(results)
    for case, ours in zip(ALONE, results[:3], strict=True):  # to the bit
        for seed, end in expected(case.network, case.precision).items():
            assert torch.equal(ours["ends"][seed], end), (case, seed)
        assert ours["skipped"] == 0
    for case, ours in zip(OVERFLOWS, results[3:6], strict=True):
        assert 0 < ours["skipped"] < sum(num_batches(i) for i in CLIENTS.values())
        for seed, end in expected("lenet", "fp16", case.scale_power).items():
            assert (ours["ends"][seed] - end).abs().max() <= (1e-3 if case.stage else 0), case
    for case, ours in zip(ZEROED, results[6:], strict=True):
        for end in ours["ends"].values():  # a correction has the last word, also on weight decay
            assert torch.equal(end, flat_model("lenet").read_parameters()), case


def test_two_ranks(tmp_path_factory):
    cases, ends = [Case("lenet", "fp32"), *TOGETHER], expected("lenet", "fp32")
    first, second = trained(tmp_path_factory, cases, *two_ranks("torchrun"))
    for seed, end in (first[0]["ends"] | second[0]["ends"]).items():  # a client each
        assert torch.equal(end, ends[seed])
    assert [sorted(rank[0]["ends"]) for rank in (first, second)] == [[0, 2], [1]]
    for case, one, two in zip(TOGETHER, first[1:], second[1:], strict=True):  # a client together
        for seed, end in ends.items():
            assert torch.equal(one["ends"][seed], two["ends"][seed])
            assert (one["ends"][seed] - end).abs().max() <= 1e-5, case


def test_deepspeeds_own_launcher(tmp_path_factory):
    cases, ends = [Case("lenet", "fp32")], expected("lenet", "fp32")
    for rank in trained(tmp_path_factory, cases, *two_ranks("deepspeed")):
        for seed, end in rank[0]["ends"].items():
            assert torch.equal(end, ends[seed])


# --- the other side -------------------------------------------------------------------------------


def train_case(case: Case) -> dict:
    """With a DeepSpeed engine: a rank's own clients, or its share of each batch."""
    rank, size, k = dist.get_rank(), dist.get_world_size(), case.ranks_per_client
    team = Team(rank % k, k, rank // k, dist.new_group(range(size)) if k > 1 else None)
    given = {"zero_optimization": {"stage": case.stage}}
    given["fp16"] = {"initial_scale_power": case.scale_power}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "deepspeed.json")
        path.write_text(json.dumps(given))
        config = Config(local=LOCAL, deepspeed_config=str(path))
        engine = DeepSpeedEngine(flat_model(case.network), config, case.precision, team, folder)
    mine = {seed: part for seed, part in CLIENTS.items() if seed % (size // k) == rank // k}
    take_all = (lambda x, gradient: gradient.zero_()) if case.zeroed else None
    return train_clients(engine, mine, take_all)


if __name__ == "__main__":
    from distributed import Ranks
    from training.deepspeed_engine import DeepSpeedEngine

    ranks = Ranks(Config(device="cpu", trackers=[], distributed=Distributed(engine="deepspeed")))
    *_, folder, words = sys.argv  # DeepSpeed's launcher puts --local_rank before them
    results = [train_case(Case(**case)) for case in json.loads(words)]
    torch.save(results, f"{folder}/rank{dist.get_rank()}.pt")
