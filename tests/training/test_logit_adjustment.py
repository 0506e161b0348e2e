"""logit_adjustment.py against counting, and where the logits' biases lie in each network."""

import math
from collections import Counter

import pytest
import torch
from helpers.noise import CPU

from cnn_model import build_network
from training.flat_model import FlatModel
from training.logit_adjustment import adjustment


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("labels", [[], [2], [0, 0, 3, 0, 2, 3]])
def test_the_adjustment_is_tau_times_the_log_of_a_share(labels, tau):
    counts = Counter(labels)
    expected = [tau * math.log((counts[c] + 1) / (len(labels) + 4)) for c in range(4)]
    found = adjustment(torch.tensor(labels, dtype=torch.int64), 4, tau)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("name", ["resnet18", "resnet18v2", "resnet50", "lenet", "cnn"])
def test_the_head_bias_is_added_to_the_logits(name):
    model = FlatModel(build_network(name, 7, (32, 32), 0), CPU)
    model.network.eval()
    images, shift = torch.randn(2, 3, 32, 32), torch.arange(7.0)
    with torch.no_grad():
        before = model.network(images)
        model.head_bias.add_(shift)
        torch.testing.assert_close(model.network(images), before + shift, rtol=1e-4, atol=1e-4)
