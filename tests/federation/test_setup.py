"""federation/setup.py: what diverse clients train on."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.runs import make_federation

from config import Config, ConfigError, Local
from federation.setup import make_clients

DIVERSE = ["data.diversity.quantity=1", "data.diversity.noise=0.1", "data.diversity.relabelled=0.5"]


def test_without_diversity_clients_see_the_data_set_itself(tmp_path):
    federation = make_federation(tmp_path)
    assert federation.client_data is federation.dataset


def test_clients_train_on_what_they_see_and_counts_are_the_servers(tmp_path):
    federation, plain = make_federation(tmp_path, *DIVERSE), make_federation(tmp_path, name="plain")
    seen, dataset = federation.client_data, federation.dataset
    assert not torch.equal(seen.train_images, dataset.train_images)
    assert torch.equal(federation.pictures.train_labels, seen.train_labels)
    for kept, whole in zip(federation.shards, plain.shards, strict=True):
        assert len(kept) < len(whole) and np.isin(kept, whole).all()
    own = [
        (seen.train_labels[part] != dataset.train_labels[part]).all() for part in federation.shards
    ]
    assert sum(own) == 2  # half of the four clients
    for counts, part in zip(federation.labels_per_client, federation.shards, strict=True):
        assert np.array_equal(counts, np.bincount(dataset.train_labels[part], minlength=10))
    assert torch.equal(federation.pictures.labels["test"], dataset.test_labels)
    assert federation.server.weights == list(map(len, federation.shards))


def test_pictures_of_diverse_clients_are_kept_and_drawn(run):
    status, folder = run("rounds=1", *DIVERSE, draws=True)
    assert status == 0 and (folder / "plots" / "sample_pictures.png").stat().st_size > 0
    with np.load(folder / "samples.npz") as samples, np.load(folder / "partition.npz") as split:
        assert samples["client"].tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8
        own = samples["labels"] != samples["classes"]
        assert own.reshape(4, 8).all(axis=1).sum() == 2 and own.mean() == 0.5
        assert split["labels_per_client"].sum() == len(split["indices"])
    environment = json.loads((folder / "environment.json").read_text())
    status, plain = run("rounds=1", name="plain")
    assert not (plain / "samples.npz").exists()
    other = json.loads((plain / "environment.json").read_text())
    assert other["partition_sha256"] != environment["partition_sha256"]


def test_deepspeeds_launcher_takes_sgd_alone():
    """distributed.engine: auto finds out only when the run starts."""
    config, ranks = Config(local=Local(optimizer="AdamW")), SimpleNamespace(use_deepspeed=True)
    with pytest.raises(ConfigError, match="^local.optimizer: DeepSpeed's engine takes SGD; start"):
        make_clients(config, None, None, [], None, ranks)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], 6),
        (["submodel.widths=[1,0.5]"], 3),
        (["schedule.name=hierarchical", "schedule.edges=4"], 2),
        (["schedule.name=fedbuff", "schedule.concurrency=5"], 5),
        (["schedule.name=fedbuff", "network.spread=1", "network.uplink_mbps=1"], 1),
    ],
)
def test_how_many_clients_a_device_has_at_a_time(tmp_path, words, expected):
    """It is what lanes are measured with."""
    dense = ["pruning.method=none", "uplink.values=fp32", "model.norm_policy=static"]
    dense += ["uplink.error_feedback=false", "server.optimizer=FedAvg"]
    cohort = ["clients.total=8", "clients.per_round=6"]
    assert make_federation(tmp_path, *dense, *cohort, *words).num_at_once == expected
