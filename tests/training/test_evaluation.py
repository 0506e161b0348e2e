"""Scores on held-out pictures, and what each client would see of them."""

import copy

import numpy as np
import pytest
import torch
from helpers.noise import PICTURES, flat_model
from helpers.runs import make_plain_federation, summary
from torch.nn.functional import cross_entropy

from training.evaluation import client_accuracies, evaluate


def test_evaluate_counts_and_sums_over_its_part_of_the_test_set():
    model = flat_model("resnet18")
    model.buffers.mul_(1.5)  # statistics that a batch would not have
    module = copy.deepcopy(model.network).eval()
    buffers = model.buffers.clone()
    parts = [evaluate(model, PICTURES, "fp32", "test", *part) for part in ((0, 10), (10, 17))]
    with torch.no_grad():
        images, labels = PICTURES.evaluation_batch("test", 0, 17)
        logits = module(images)
    right = labels[logits.argmax(1) == labels].tolist()
    assert [a + b for a, b in zip(parts[0][0], parts[1][0], strict=True)] == [
        right.count(label) for label in range(3)
    ]
    expected = float(cross_entropy(logits, labels, reduction="sum"))
    assert sum(loss for _, loss in parts) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(model.buffers, buffers)


def test_a_clients_accuracy_is_that_of_its_classes_by_hand():
    right, counts = np.array([8, 5, 0]), np.array([10, 10, 10])
    labels = np.array([[1, 1, 0], [0, 0, 4], [3, 0, 1]])
    assert client_accuracies(right, counts, labels) == pytest.approx([0.65, 0.0, 0.6])


def test_a_class_that_is_not_tested_does_not_count():
    right, counts = np.array([8, 0]), np.array([10, 0])
    labels = np.array([[1, 9], [0, 5], [0, 0]])  # the second has nothing else, the third nothing
    assert client_accuracies(right, counts, labels).tolist() == [0.8]


def test_equal_clients_see_the_test_accuracy():
    right, counts = np.array([80, 50, 20]), np.array([100, 100, 100])
    accuracies = client_accuracies(right, counts, np.full((7, 3), 10))
    assert accuracies == pytest.approx(np.full(7, 0.5))


def test_scores_of_a_run_are_those_of_a_plain_loop(tmp_path):
    one = make_plain_federation(
        tmp_path,
        *("data.partition.name=pathological", "data.validation=0.1", "clients.total=20"),
        *("data.partition.args={num_classes_per_partition: 2}", "evaluation.batch_size=100"),
    )
    row, _ = one.run_round()
    one.clients.load(one.server.parameters.detach(), one.server.buffers)
    network, pictures = one.model.network.eval(), one.pictures
    for split, size in (("test", 360), ("validation", len(one.dataset.validation_labels))):
        images, labels = pictures.evaluation_batch(split, 0, size)
        with torch.no_grad():
            logits = network(images)
        right = logits.argmax(1) == labels
        assert row[f"{split}_accuracy"] == pytest.approx(float(right.float().mean()))
        assert row[f"{split}_loss"] == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-5)
        if split == "test":
            rate = [float(right[labels == c].float().mean()) for c in range(10)]
    seen = []
    for indices in one.shards:
        own = one.dataset.train_labels[indices].tolist()
        seen.append(sum(rate[label] for label in own) / len(own))
    assert row["client_accuracy_mean"] == pytest.approx(np.mean(seen))
    worst = sorted(seen)[:2]  # a tenth of twenty
    assert row["client_accuracy_worst_decile"] == pytest.approx(np.mean(worst))
    assert row["client_accuracy_worst_decile"] <= row["client_accuracy_mean"]


def test_the_summary_says_what_clients_see_and_the_validation_accuracy(run):
    _, folder = run("data.validation=0.1", "evaluation.last=2")
    result = summary(folder)
    for key in ("client_accuracy_mean", "client_accuracy_worst_decile", "validation_accuracy"):
        assert 0 <= result[key] <= 1
    assert result["test_accuracy_mean_over"] == 2
