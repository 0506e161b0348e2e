"""ordered_dropout.py against networks that are built narrow."""

from collections import Counter

import torch
from helpers.networks import flat
from helpers.pictures import noise
from torch.nn.functional import cross_entropy

from config import Local
from data import Pictures
from distributed import Team
from training.draws import Draws
from training.local_sgd import train_client
from training.ordered_dropout import OrderedDropoutEngine

SHARES = [1.0, 0.5, 0.25]
LOCAL = Local(batch_size=8, lr=0.1, momentum=0.0, weight_decay=0.0, steps=1)


def some_pictures() -> Pictures:
    return Pictures(noise(40, 7, 8, 8), torch.device("cpu"), padding=1)


def models():
    return [flat("lenet", width=share) for share in SHARES]


def prefix(tensor, shape):
    return tensor[tuple(slice(length) for length in shape)]


def test_a_step_is_that_of_a_network_built_narrow_and_leaves_the_rest():
    pictures, seen = some_pictures(), Counter()
    for seed in range(12):
        whole, *narrower = models()
        before = [p.detach().clone() for p in whole.network.parameters()]
        engine = OrderedDropoutEngine(whole, LOCAL, "fp32", Team(), narrower)
        indices = torch.arange(8)
        train_client(engine, pictures, indices, LOCAL, 0.1, seed)
        share = SHARES[engine.models.index(engine.drawn)]
        seen[share] += 1
        built = flat("lenet", width=share).network
        draws = Draws.from_seed(seed, torch.device("cpu"))
        for tensor, first in zip(built.parameters(), before, strict=True):
            tensor.data.copy_(prefix(first, tensor.shape))
        images, labels = pictures.train_batch(indices[draws.order(8)], draws)
        cross_entropy(built(images), labels).backward()
        for tensor, first, after in zip(
            built.parameters(), before, whole.network.parameters(), strict=True
        ):
            expected = first.clone()
            prefix(expected, tensor.shape).sub_(0.1 * tensor.grad)
            torch.testing.assert_close(after.detach(), expected, rtol=0, atol=1e-6)
            outside = torch.ones_like(first, dtype=torch.bool)
            prefix(outside, tensor.shape).fill_(False)
            assert torch.equal(after.detach()[outside], first[outside])
    assert set(seen) == set(SHARES)


def test_widths_are_equally_likely_and_depend_on_the_step_alone():
    whole, *narrower = models()
    engine = OrderedDropoutEngine(whole, LOCAL, "fp32", Team(), narrower)
    engine.begin(0.0, None)
    pictures, draws, seen = some_pictures(), Draws.from_seed(3, torch.device("cpu")), []
    for step in range(300):
        engine.train_batch(pictures, torch.arange(2), draws.at(step))
        seen.append(engine.models.index(engine.drawn))
    assert all(70 < count < 130 for count in Counter(seen).values()) and len(set(seen)) == 3
    engine.train_batch(pictures, torch.arange(5), draws.at(17))
    assert engine.models.index(engine.drawn) == seen[17]


def test_dropout_layers_of_narrow_networks_draw_too():
    whole, *narrower = (flat("cnn", width=share * 0.25) for share in SHARES)
    engine = OrderedDropoutEngine(whole, LOCAL, "fp32", Team(), narrower)
    pictures = some_pictures()
    losses = [
        float(train_client(engine, pictures, torch.arange(8), LOCAL, 0.0, seed)[0])
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]
