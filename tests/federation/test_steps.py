"""steps.py: how many batches a client trains by a deadline, and that it trains so many."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.runs import make_federation, make_plain_federation

from config import ConfigError, Local
from federation.steps import num_trained

CLIENTS = "uplink_mbps,downlink_mbps,latency_ms,ms_per_example\n"
FIT = ["clients.total=5", "clients.per_round=5", "local.steps=8", "local.fit_deadline=true"]
FIT += ["schedule.deadline_seconds=3", "pruning.method=none", "uplink.values=fp32"]
FIT += ["uplink.error_feedback=false", "data.partition.name=iid"]


def test_examples_by_hand():
    local = Local(batch_size=4, epochs=2)
    sizes = np.array([0, 3, 9, 10])
    assert num_trained(local, sizes).tolist() == [0, 6, 18, 20]
    steps = replace(local, client_steps=[1, 3])  # of 9 pictures an epoch has batches of 4 and 5
    assert num_trained(steps, sizes).tolist() == [0, 9, 4, 10]
    full = replace(steps, algorithm="SCAFFOLD", options={"option": 1})
    assert num_trained(full, sizes).tolist() == [0, 12, 13, 20]


def clients_file(tmp_path, rows) -> str:
    path = tmp_path / "clients.csv"
    path.write_text(CLIENTS + "".join(f"{','.join(map(str, row))}\n" for row in rows))
    return f"network.clients_file={path}"


ROWS = [(100, 100, 20, 0), (100, 100, 20, 20), (100, 100, 20, 40), (0.5, 100, 20, 20)]
ROWS += [(100, 100, 20, 1000)]


def test_a_client_trains_as_many_batches_as_arrive_in_time(tmp_path):
    one = make_federation(tmp_path, *FIT, clients_file(tmp_path, ROWS))
    row, rows = one.run_round()
    ends = {message.sender: message.start + message.seconds for message in rows}
    steps = one.clients.config.local.client_steps
    assert steps[0] == 8 and steps[1] > steps[2] > steps[4] == 1 and steps[1] > steps[3] > 1
    assert row["late"] == [4]  # it cannot even train a batch in time
    size = 4 * one.model.layout.size
    for client, (up, down, latency, ms) in list(enumerate(ROWS))[:4]:
        sending = size * 8 / 1e6 * (1 / up + 1 / down) * 1514 / 1448 + 2 * latency / 1e3
        times = [sending + n * 16 * ms / 1e3 for n in range(1, 9)]
        assert ends[str(client)] == pytest.approx(times[steps[client] - 1], abs=0.01)
        assert sum(time < 3 for time in times) - 1 <= steps[client] <= sum(t < 3 for t in times)


def test_with_densities_training_gets_half_of_the_time_where_both_are_slow(tmp_path):
    words = [*FIT, "pruning.method=random", "pruning.density=1.0", "pruning.fit_deadline=true"]
    rows = [(0.2, 100, 0, 20), (0.2, 100, 0, 1), (100, 100, 0, 20)] + 2 * [(100, 100, 0, 1)]
    one = make_federation(tmp_path, *words, clients_file(tmp_path, rows))
    assert one.clients.config.local.client_steps == [4, 8, 8, 8, 8]  # 0.32 s each, of 1.35 s
    densities = one.clients.config.pruning.client_densities
    assert 0.3 < densities[0] < densities[1] < densities[2] == 1
    row, _ = one.run_round()
    assert row["num_late"] == 0 and one.server.agreement.config.local.client_steps[0] == 4


@pytest.mark.parametrize("lanes", ["1", "2"])
def test_each_client_trains_its_own_number_of_batches(tmp_path, lanes):
    """Averaging by FedNova, the sum is the one that its paper writes down."""
    words = ["clients.total=3", "data.partition.name=iid", "local.algorithm=FedNova"]
    one = make_plain_federation(
        tmp_path, *words, "local.client_steps=[1,2,4]", f"local.lanes={lanes}"
    )
    before, moves = one.server.parameters.detach().clone(), []
    for client, steps in enumerate([1, 2, 4]):
        alone = make_plain_federation(
            tmp_path, *words[:2], f"local.steps={steps}", name=f"alone{client}"
        )
        [update] = alone.clients.train([client], 1, alone.server.broadcast(1, [client]))
        assert update.report.step_length == pytest.approx(0.05 * steps)
        moves.append(update.update / steps)
    one.run_round()
    weights = torch.tensor([len(shard) for shard in one.shards]) / sum(map(len, one.shards))
    mean_steps = float(weights @ torch.tensor([1.0, 2.0, 4.0]))
    expected = mean_steps * sum(w * move for w, move in zip(weights, moves, strict=True))
    torch.testing.assert_close(
        one.server.parameters.detach() - before, expected, rtol=1e-4, atol=1e-6
    )
    assert one.workload.num_trained.tolist() == [16, 32, 64]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["schedule.deadline_seconds=null"], "local.fit_deadline: fits to schedule.deadline"),
        (["local.client_steps=[1]"], "local.client_steps: local.fit_deadline chooses them"),
        (["local.client_steps=[0]"], "local.client_steps: 0 is out of range"),
        (["local.client_steps=[1,1,1,1,1,1]"], "more numbers than clients.total=5"),
        (["schedule.deadline_seconds=0.001"], "0.001 s are too few for every client"),
    ],
)
def test_bad_input_is_refused(tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        make_federation(tmp_path, *FIT, *words)


def test_the_download_is_estimated_by_its_coder(tmp_path):
    """An 8-bit model arrives sooner, which leaves time for more steps."""
    path = tmp_path / "clients.csv"
    path.write_text("uplink_mbps,downlink_mbps,latency_ms,ms_per_example\n" + "100,2,0,5\n" * 4)
    words = [f"network.clients_file={path}", "local.fit_deadline=true", "local.steps=20"]
    words += ["schedule.deadline_seconds=1.5", "pruning.density=0.01"]
    steps = {}
    for coder in ("fp32", "int8"):
        one = make_federation(tmp_path, *words, f"downlink.values={coder}", name=coder)
        [steps[coder]] = set(one.clients.config.local.client_steps)
        row, _ = one.run_round()
        assert row["num_late"] == 0
    assert steps["fp32"] < steps["int8"]
