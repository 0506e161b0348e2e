"""flat_model.py: a network's parameters, gradients and buffers as vectors."""

import copy

import pytest
import torch
from helpers.networks import SMALL, build, flat
from torch import nn
from torch.nn.functional import cross_entropy

from cnn_model import build_network
from training.flat_model import FlatModel

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_layout_is_that_of_the_parameters():
    network = build("resnet18", width=0.1)
    named = list(network.named_parameters())
    values = torch.cat([p.detach().flatten() for _, p in named])
    model = FlatModel(network, CPU)
    assert model.layout.names == tuple(name for name, _ in named)
    assert model.layout.shapes == tuple(tuple(p.shape) for _, p in named)
    assert torch.equal(model.read_parameters(), values)
    assert model.parameters.dtype == torch.float32 and model.parameters.is_contiguous()


@pytest.mark.parametrize("width", [n / 10 for n in range(1, 11)])
@pytest.mark.parametrize(
    ("name", "norm"),
    [("resnet18", "batch"), ("resnet18", "group(1)"), ("resnet50", "batch")]
    + [("resnet18v2", "group(1)")]
    + [("cnn", "batch"), ("lenet", "batch")],
)
def test_every_tensor_starts_at_a_multiple_of_16_bytes(name, norm, width):
    """GPU kernels read four floats at once; cuDNN's BatchNorm fails at other addresses."""
    network = flat(name, width=width, norm=norm).network
    tensors = [*network.parameters(), *network.buffers(), *(p.grad for p in network.parameters())]
    assert [tensor.data_ptr() % 16 for tensor in tensors] == [0] * len(tensors)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("resnet18", {}),
        ("resnet18", dict(norm="group(2)", num_classes=7)),
        ("resnet18", dict(stem="imagenet", num_classes=1000)),
        ("resnet50", {}),
        ("cnn", {}),
    ],
)
def test_usual_networks_have_no_gaps_and_copy_nothing(name, settings):
    model = flat(name, size=(32, 32), **settings)
    assert model.read_parameters() is model.parameters
    vector = torch.zeros(model.layout.size)
    assert model.aligned(vector) is vector and model.compact(vector) is vector


def test_gaps_by_hand():
    """Weights of 3 and 6 floats and biases of 1 and 2: gaps of 3, 3 and 2 floats, none at last."""
    model = FlatModel(nn.Sequential(nn.Linear(3, 1), nn.Linear(3, 2)), CPU)
    assert model.layout.offsets.tolist() == [0, 3, 4, 10, 12]
    vector = torch.arange(1.0, 13.0)
    spread = [1, 2, 3, 0, 4, 0, 0, 0, 5, 6, 7, 8, 9, 10, 0, 0, 11, 12]
    assert model.aligned(vector).tolist() == spread
    assert model.aligned(vector > 3).tolist() == [number > 3 for number in spread]
    assert torch.equal(model.compact(model.aligned(vector)), vector)
    model.load(vector)
    assert model.parameters.tolist() == spread and model.read_parameters().tolist() == [
        *range(1, 13)
    ]
    assert model.network[1].weight.tolist() == [[5, 6, 7], [8, 9, 10]]
    assert [view.tolist() for view in model.views(torch.tensor(spread))] == [
        [[1, 2, 3]],
        [4],
        [[5, 6, 7], [8, 9, 10]],
        [11, 12],
    ]


def test_loading_a_model_puts_it_into_the_network():
    """In the order of the layouts, gaps or not, and without a word on buffers they stay."""
    for settings in (dict(width=0.1), dict(width=0.125)):
        model = flat("resnet18", **settings)
        parameters = torch.randn(model.layout.size)
        buffers = torch.randn(model.buffer_layout.size)
        model.load(parameters, buffers)
        model.load(parameters)
        assert torch.equal(model.read_parameters(), parameters)
        assert torch.equal(model.read_buffers(), buffers)
        flattened = torch.cat([p.detach().flatten() for p in model.network.parameters()])
        assert torch.equal(flattened, parameters)
        assert torch.equal(torch.cat([b.flatten() for b in model.network.buffers()]), buffers)


def test_writing_to_the_vector_changes_the_network():
    model = flat("lenet")
    images = torch.randn(2, 3, 8, 8)
    model.parameters.zero_()
    assert torch.equal(model.network(images), torch.zeros(2, 10))
    bias = model.layout.names.index("11.bias")
    model.views(model.parameters)[bias].copy_(torch.arange(10.0))
    assert torch.equal(model.network(images)[1], torch.arange(10.0))
    with torch.no_grad():
        model.network[0].weight.fill_(7.0)  # and the other way round
    assert torch.equal(model.read_parameters()[: 6 * 3 * 25], torch.full((450,), 7.0))


def test_gradients_land_in_the_flat_vector_and_add_up():
    model, plain = flat("lenet"), build("lenet")
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    for times in (1, 2):
        cross_entropy(model.network(images), labels).backward()
        cross_entropy(plain(images), labels).backward()
        expected = torch.cat([p.grad.flatten() for p in plain.parameters()])
        assert torch.equal(model.compact(model.gradients), expected), times
    model.gradients.zero_()
    assert all(not p.grad.any() for p in model.network.parameters())


def test_views_have_the_shapes_of_the_parameters():
    model = flat("lenet")
    vector = torch.arange(model.layout.size, dtype=torch.float32)
    aligned = model.aligned(vector)
    views = model.views(aligned)
    assert [tuple(view.shape) for view in views] == list(model.layout.shapes)
    assert torch.equal(torch.cat([view.flatten() for view in views]), vector)
    assert views[0].data_ptr() == aligned.data_ptr()


def test_buffers_are_views_counters_included():
    model = flat("resnet18", **SMALL)
    network = model.network
    named = dict(network.named_buffers())
    assert model.buffer_layout.names == tuple(named)
    counters = [name for name in named if name.endswith("num_batches_tracked")]
    assert len(counters) == 20 and int(model.is_counter.sum()) == 20
    assert model.buffers.dtype == torch.float32
    assert model.buffer_layout.size == len(model.read_buffers()) == len(model.is_counter)

    network.train()
    for _ in range(3):
        network(torch.randn(4, 3, 8, 8) + 5)
    assert model.read_buffers()[model.is_counter].tolist() == [3.0] * 20
    now = torch.cat([b.flatten() for b in network.buffers()])
    assert torch.equal(model.read_buffers(), now)
    assert network.norm1.running_mean.abs().max() > 0
    model.buffers.zero_()
    assert all(not buffer.any() for buffer in network.buffers())


def test_a_network_without_buffers():
    model = flat("cnn")
    assert model.read_buffers().shape == (0,) and model.is_counter.shape == (0,)
    assert model.buffer_layout.size == 0


def test_training_with_batchnorm_equals_that_of_the_plain_network():
    """Several steps, with backward: views must not confuse autograd or the running statistics."""
    network = build("resnet18", **SMALL)
    plain, model = copy.deepcopy(network), FlatModel(network, CPU)
    generator = torch.Generator().manual_seed(0)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.05)
    for _ in range(4):
        images = torch.randn(8, 3, 8, 8, generator=generator)
        labels = torch.randint(10, (8,), generator=generator)
        sgd.zero_grad()
        cross_entropy(plain(images), labels).backward()
        sgd.step()
        model.gradients.zero_()
        cross_entropy(model.network(images), labels).backward()
        model.parameters.sub_(model.gradients, alpha=0.05)
    ours, theirs = model.network.state_dict(), plain.state_dict()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name].float(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(
            model.network.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5
        )


def test_norm_positions_are_the_weights_and_biases_of_norm_layers():
    for norm in ("batch", "group(2)"):
        model = FlatModel(build_network("resnet18", 10, (8, 8), 0, norm=norm, width=0.0625), CPU)
        marks = torch.zeros(model.layout.size)
        for module in model.network.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                module.weight.data.fill_(7.0)
                module.bias.data.fill_(7.0)
        marks[model.norm_positions()] = 1
        assert torch.equal(marks.bool(), model.parameters == 7.0)
    assert len(FlatModel(build_network("lenet", 10, (8, 8), 0), CPU).norm_positions()) == 0
