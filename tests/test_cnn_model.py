"""cnn_model.py: the networks against torchvision and plain transcriptions of papers."""

import os
import subprocess
import sys

import pytest
import torch
import torchvision
from helpers.networks import SMALL, build, flat
from helpers.runs import REPOSITORY
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from cnn_model import Conv2d, Dropout
from training.flat_model import FlatModel

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("resnet18", {}, 11_173_962),
        ("resnet50", {}, 23_520_842),
        ("cnn", {}, 1_626_442),
        ("lenet", {}, 62_006),
        # the norms stand elsewhere than resnet18's, and are as many
        ("resnet18v2", dict(norm="group(2)"), 11_173_962),
        ("resnet18v2", dict(num_classes=1000, stem="imagenet"), 11_689_512),
        # torchvision publishes 11,689,512 and 25,557,032
        ("resnet18", dict(num_classes=1000, stem="imagenet"), 11_689_512),
        ("resnet50", dict(num_classes=1000, stem="imagenet"), 25_557_032),
        # GroupNorm has BatchNorm's weights and biases
        ("resnet18", dict(norm="group(2)"), 11_173_962),
        ("lenet", dict(num_classes=100), 62_006 + 90 * 85),
    ],
)
def test_number_of_parameters(name, settings, expected):
    with torch.device("meta"):  # shapes only
        network = build(name, (32, 32), **settings)
    assert sum(p.numel() for p in network.parameters()) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    # the last feature map is 1x1 without padding; 2x2 and 4x3 with it
    [
        ((16, 16), 14_006 + 16 * 120),
        ((8, 8), 14_006 + 16 * 4 * 120),
        ((16, 15), 14_006 + 16 * 4 * 3 * 120),
    ],
)
def test_lenet_pads_pictures_under_16x16(size, expected):
    # 456 + 2,416 in the convolutions; 120 + 10,164 + 850 in the layers but for the first's weights
    with torch.device("meta"):
        network = build("lenet", size)
    assert sum(p.numel() for p in network.parameters()) == expected


def test_the_cnn_drops_out_as_pfl_research_does():
    assert [m.p for m in build("cnn").modules() if isinstance(m, nn.Dropout)] == [0.25, 0.5]


class TorchBytes:
    """Bytes from torch's generator; `asked`: the purposes."""

    def __init__(self, seed: int):
        self.seed, self.asked = seed, []

    def bytes(self, count: int, purpose: str) -> torch.Tensor:
        self.asked.append(purpose)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(256, (count,), generator=generator, dtype=torch.uint8)


def test_the_dropout_layers_of_a_network_ask_for_draws_of_their_own():
    model, draws = FlatModel(build("cnn"), CPU), TorchBytes(0)
    model.train()
    model.use_draws(draws)
    model.network(torch.zeros(1, 3, 8, 8))
    assert draws.asked == ["dropout 0", "dropout 1"]


@pytest.mark.parametrize("p", [0.25, 0.5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_its_share_and_scales_the_rest(p, memory_format, dtype):
    drop = Dropout(p)
    x = torch.rand(10, 33, 15, 17).add(1).to(dtype).contiguous(memory_format=memory_format)
    x.requires_grad_()
    drop.draws, drop.number = TorchBytes(4), 3
    y = drop(x)
    assert drop.draws.asked == ["dropout 3"]
    assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
    kept = y != 0
    scale = torch.tensor(1 / (1 - p), dtype=dtype)
    assert torch.equal(y[kept], (x * scale)[kept])
    for part in (kept, kept[:5], kept[:, ::2], kept[..., 1:]):  # six sigma
        share = part.float().mean().item()
        assert share == pytest.approx(1 - p, abs=6 * (p * (1 - p) / part.numel()) ** 0.5)
    y.float().sum().backward()
    assert torch.equal(x.grad, kept * scale)
    assert torch.equal(drop(x), y)
    assert torch.equal(drop(x.contiguous()), y)  # whatever the memory format
    drop.draws = TorchBytes(5)
    assert not torch.equal(drop(x), y)
    assert drop.eval()(x) is x


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_resnet_with_the_imagenet_stem_is_torchvisions(name):
    ours = build(name, (64, 64), stem="imagenet")
    theirs = getattr(torchvision.models, name)(num_classes=10)
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    for a, b in pairs:
        assert a.shape == b.shape
        b.copy_(a)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for mode in ("train", "eval"):
        getattr(ours, mode)(), getattr(theirs, mode)()
        with torch.no_grad():
            torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-6)


def plain_resnet18v2(weights: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Reddi et al.'s code, layer by layer, with the imagenet stem and group(2)."""

    def conv(name, x, stride=1):
        kernel = weights[f"{name}.weight"]
        return nn.functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(name, x):
        batch, channels, height, width = x.shape
        groups = x.reshape(batch, 2, -1)
        variances, means = torch.var_mean(groups, 2, correction=0, keepdim=True)
        x = ((groups - means) / (variances + 1e-3).sqrt()).reshape(x.shape)
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return x * scale[:, None, None] + shift[:, None, None]

    x = norm("norm1", conv("conv1", images, stride=2)).relu()
    x = nn.functional.max_pool2d(x, 3, 2, 1)
    for block in range(8):
        name, received = f"stages.{block // 2}.{block % 2}", x
        if block > 0:
            x = norm(f"{name}.norm1", x).relu()
        x = conv(f"{name}.conv1", x)
        x = norm(f"{name}.norm2", x).relu()
        x = conv(f"{name}.conv2", x)
        if block in (2, 4, 6):  # twice as many channels as before
            received = norm(f"{name}.shortcut.1", conv(f"{name}.shortcut.0", received))
        x = x + received
    x = norm("norm2", x).relu().mean((2, 3))
    return x @ weights["head.weight"].T + weights["head.bias"]


def test_resnet18v2_is_the_plain_order_of_its_layers():
    network = build("resnet18v2", (24, 24), stem="imagenet", norm="group(2)", width=0.125)
    for parameter in network.parameters():  # or scales of 1 and shifts of 0 would hide mistakes
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    images = torch.randn(3, 3, 24, 24)
    plain = plain_resnet18v2(dict(network.named_parameters()), images)
    torch.testing.assert_close(network(images), plain, rtol=1e-4, atol=1e-5)


def test_resnet18v2_never_strides_after_its_stem():
    network = build("resnet18v2", (24, 24), stem="imagenet", norm="group(2)", width=0.125)
    shapes = []
    for stage in network.stages:
        stage.register_forward_hook(lambda *call: shapes.append(tuple(call[-1].shape)))
    network(torch.zeros(2, 3, 24, 24))
    assert shapes == [(2, channels, 6, 6) for channels in (8, 16, 32, 64)]


def test_first_weights_of_resnet18v2():
    """He et al.'s deviation over what comes in, and a head from N(0, 0.01) without a bias."""
    network = build("resnet18v2", norm="group(2)", width=0.5)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            expected = (2 / module.weight[0].numel()) ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=0.05)
    assert float(network.head.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert not network.head.bias.any()


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 2), (3, 2), (4, 4), (7, 3), (8, 8)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (7, 2, 3), (2, 4, 1)],
)
def test_a_convolution_on_few_pixels_is_torchs(size, kernel, stride, padding):
    ours = Conv2d(4, 6, kernel, stride, padding, bias=kernel == 2)
    theirs = nn.Conv2d(4, 6, kernel, stride, padding, bias=kernel == 2)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for layer in (ours, theirs):
        images = torch.linspace(-1, 1, 3 * 4 * size[0] * size[1]).reshape(3, 4, *size)
        out = layer(images.requires_grad_())
        gradients = torch.autograd.grad(out.square().sum(), [images, *layer.parameters()])
        results.append([out, *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


NARROW_STEPS = """
import sys

import torch

from cnn_model import Conv2d, build_network
from training.flat_model import FlatModel

torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[1]))
for channels in (1, 3, 6):
    layer = Conv2d(channels, 12, 1, 2, bias=False)
    for _ in range(100):
        x = torch.randn(16, channels, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
        out, kept = layer(x), [torch.randn(size) for size in range(1, 40)]
        gradient = torch.randn_like(out)
        (ours,) = torch.autograd.grad(out, layer.weight, gradient)
        exact = torch.einsum("nohw,nchw->oc", gradient, x.detach()[:, :, ::2, ::2])
        torch.testing.assert_close(ours[:, :, 0, 0], exact, rtol=1e-4, atol=1e-4)
for name, norm, width in (("resnet18", "batch", 0.1), ("resnet50", "group(1)", 0.02)):
    model = FlatModel(build_network(name, 3, (16, 16), 0, norm=norm, width=width), "cpu")
    for _ in range(20):
        images = torch.randn(8, 3, 16, 16).to(memory_format=torch.channels_last)
        model.network(images).square().mean().backward()
        model.parameters.sub_(model.gradients, alpha=0.01)
        model.gradients.zero_()
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_narrow_networks_train_on_a_cpu_without_avx512(threads):
    """In plain torch the heap is corrupted with one thread, and with two the gradient is wrong."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-c", NARROW_STEPS, str(threads)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_last_stage_on_pictures_of_8x8_needs_one_weight_of_nine():
    network = build("resnet18", **SMALL)
    with FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, 3, 8, 8))
    # 3x3 at stride 2 on 2x2: four weights of nine; then three convolutions on one pixel
    flops = counter.get_flop_counts()["ResNet.stages.3"][torch.ops.aten.convolution]
    assert flops == 2 * (32 * 64 * 4 + 32 * 64 + 3 * 64 * 64)


def test_the_cifar_stem_is_3x3_and_keeps_the_resolution():
    network = build("resnet18", **SMALL)
    features = []
    network.stages[0].register_forward_hook(lambda *call: features.append(call[-1].shape))
    network.stages[3].register_forward_hook(lambda *call: features.append(call[-1].shape))
    network(torch.zeros(2, 3, 32, 32))
    assert network.conv1.kernel_size == (3, 3)
    assert features == [(2, 8, 32, 32), (2, 64, 4, 4)]


def test_convolutions_start_as_he_et_al_say():
    """kaiming_normal, fan_out: a standard deviation of sqrt(2 / (channels out * kernel area))."""
    network = build("resnet18", width=0.5)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            height, width = module.kernel_size
            expected = (2 / (module.out_channels * height * width)) ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("size", [(8, 8), (8, 20), (16, 16), (17, 9), (33, 16), (32, 32)])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet18v2", "cnn", "lenet"])
def test_any_size_from_8x8_trains(name, size):
    for settings in [{}, dict(stem="imagenet", norm="group(2)")]:
        model = flat(name, size=size, width=0.0625, num_classes=3, **settings)
        model.train()
        model.use_draws(TorchBytes(0))
        logits = model.network(torch.randn(4, 3, *size))
        assert logits.shape == (4, 3)
        cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
        assert torch.isfinite(model.gradients).all() and model.gradients.abs().max() > 0


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (4, 64)])
def test_smaller_pictures_are_refused(size):
    with pytest.raises(ValueError, match=f"pictures of {size[0]}x{size[1]} are too small"):
        build("cnn", size)


def test_width_scales_the_channels_and_keeps_at_least_one():
    assert build("resnet18", width=0.5).conv1.out_channels == 32
    assert build("resnet50", width=0.25).head.in_features == 512
    assert build("lenet", width=2.0)[0].out_channels == 12
    for name in ("resnet18", "cnn", "lenet"):
        assert build(name, width=1e-9).eval()(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(("norm", "kind"), [("batch", nn.BatchNorm2d), ("group(4)", nn.GroupNorm)])
def test_norms(norm, kind):
    network = build("resnet18", norm=norm, width=0.25)
    norms = [m for m in network.modules() if "Norm" in type(m).__name__]
    assert len(norms) == 20 and all(type(m) is kind for m in norms)
    assert kind is nn.BatchNorm2d or {m.num_groups for m in norms} == {4}


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match=r"group\(3\) does not divide the 64 channels"):
        build("resnet18", norm="group(3)")


@pytest.mark.parametrize("name", ["resnet18", "resnet18v2", "cnn", "lenet"])
def test_weights_depend_on_the_seed_alone(name):
    def weights(seed):
        return flat(name, seed=seed, **SMALL).parameters

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(weights(5), first)
    assert not torch.equal(weights(6), first)
