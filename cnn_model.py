"""The networks that clients train, with the first weights that a seed gives them.

ResNets are torchvision's blocks (He et al. 2016, arXiv 1512.03385) behind a stem that fits the
pictures. `resnet18v2` is the network of Reddi et al. (2021, arXiv 2003.00295), `cnn` that of
pfl-research's CIFAR-10 benchmark, and `lenet` that of NIID-Bench (Li et al. 2022, arXiv
2102.02079).
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, relu
from torchvision.models.resnet import BasicBlock, Bottleneck


class Conv2d(nn.Conv2d):
    """nn.Conv2d without the work of weights that meet nothing but padding, and without a crash.

    If one output is left, as in the last stage for pictures of 8x8, only the part of the kernel
    that lies on the picture counts: one weight of nine for a 3x3 kernel on one pixel.

    A strided 1x1 convolution of fewer than 8 channels, which narrow ResNets have in their
    shortcuts, must not reach oneDNN on a CPU without AVX-512: in channels_last its kernel for the
    weights' gradient (jit_1x1:avx2 of oneDNN 3.12) writes past the end of its memory with one
    thread and returns wrong numbers with more. Such a convolution skips the pixels itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, padding = self.kernel_size[0], self.stride[0], self.padding[0]
        if kernel == 1 and stride > 1 and self.in_channels < 8 and x.device.type == "cpu":
            return conv2d(x[:, :, ::stride, ::stride], self.weight, self.bias)
        height, width = x.shape[2:]
        for side in (height, width):
            if padding + side > kernel or side + 2 * padding - kernel >= stride:
                return super().forward(x)
        inside = slice(padding, padding + height), slice(padding, padding + width)
        return conv2d(x, self.weight[:, :, *inside], self.bias)


class ResNet(nn.Module):
    """[B, 3, H, W] -> [B, num_classes], for any H, W >= 8."""

    def __init__(
        self,
        block: type[nn.Module],  # BasicBlock, Bottleneck or PreActivationBlock
        depths: tuple[int, ...],  # blocks in each stage
        num_classes: int,
        stem: str = "cifar",  # cifar: 3x3; imagenet: 7x7 with stride 2, then a 3x3 max pool
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        width: int = 64,  # channels of the first stage
        stride: int = 2,  # of all stages but the first
    ):
        super().__init__()
        kernel, first_stride, pool = {
            "cifar": (3, 1, nn.Identity()),
            "imagenet": (7, 2, nn.MaxPool2d(3, stride=2, padding=1)),
        }[stem]
        self.conv1 = nn.Conv2d(3, width, kernel, first_stride, padding=kernel // 2, bias=False)
        self.norm1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.pool = pool
        stages, channels = [], width
        for stage, depth in enumerate(depths):
            planes = width * 2**stage
            blocks = []
            for index in range(depth):
                step = stride if stage > 0 and index == 0 else 1
                blocks.append(_residual(block, channels, planes, step, norm))
                channels = planes * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.__class__ = Conv2d  # torchvision's blocks hold nn.Conv2d
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm1(self.conv1(x))))
        return self.head(self.stages(x).mean(dim=(2, 3)))


def _residual(block: type, channels: int, planes: int, stride: int, norm: Callable) -> nn.Module:
    out = planes * block.expansion
    shortcut = None
    if stride != 1 or channels != out:
        conv = nn.Conv2d(channels, out, 1, stride, bias=False)
        shortcut = nn.Sequential(conv, norm(out))
    return block(channels, planes, stride, shortcut, norm_layer=norm)


class PreActivationBlock(nn.Module):
    """[B, channels, H, W] -> [B, planes, H, W]: norm and ReLU come before each convolution.

    Its arguments are those of torchvision's BasicBlock.
    """

    expansion = 1

    def __init__(self, channels, planes, stride, shortcut, norm_layer):
        super().__init__()
        self.norm1, self.norm2 = norm_layer(channels), norm_layer(planes)
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(relu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(relu(self.norm2(out)))


class ResNetV2(ResNet):
    """A ResNet-18 of pre-activation blocks (He et al. 2016, arXiv 1603.05027) without strides.

    As in the published code of Reddi et al. 2021: all stages have the resolution that the stem
    leaves, and the head starts from N(0, 0.01).
    """

    def __init__(self, num_classes: int, stem: str, norm: Callable[[int], nn.Module], width: int):
        super().__init__(PreActivationBlock, (2, 2, 2, 2), num_classes, stem, norm, width, stride=1)
        self.stages[0][0].norm1 = nn.Identity()  # the stem ends with a norm and a ReLU
        self.norm2 = norm(self.head.in_features)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            elif isinstance(module, nn.GroupNorm):
                module.eps = 1e-3  # as in the authors' library; torch has 1e-5
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm1(self.conv1(x))))
        return self.head(relu(self.norm2(self.stages(x))).mean(dim=(2, 3)))


class Draws(Protocol):
    """What dropout needs of training/draws.py."""

    def bytes(self, count: int, purpose: str) -> Tensor:
        """uint8 [count]."""


class Dropout(nn.Dropout):
    """Dropout whose mask comes from `draws`, as bytes, so p is a multiple of 1/256.

    Whoever trains the network sets `draws` for every step (FlatModel.use_draws). `number` tells the
    layers of a network apart. The mask of a 4-d activation is drawn in the order of channels_last,
    whatever the memory format, so that it does not depend on that.
    """

    draws: Draws
    number = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        drawn = self.draws.bytes(x.numel(), f"dropout {self.number}")
        if x.dim() == 4:
            count, channels, height, width = x.shape
            drawn = drawn.view(count, height, width, channels).permute(0, 3, 1, 2)
        kept = drawn.view(x.shape) >= round(256 * self.p)
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))


def cnn(num_classes: int, image_size: tuple[int, int], width: float) -> nn.Module:
    """pfl-research's CIFAR-10 network: 1,626,442 parameters at 32x32 and width 1."""
    a, b, hidden = (max(1, round(width * n)) for n in (32, 64, 128))
    height, width_ = ((side - 4) // 2 for side in image_size)
    return nn.Sequential(
        nn.Conv2d(3, a, 3),
        nn.ReLU(),
        nn.Conv2d(a, b, 3),
        nn.MaxPool2d(2),
        nn.ReLU(),  # after the pool it gives the same output and gradient for a quarter of the work
        Dropout(0.25),
        nn.Flatten(),
        nn.Linear(b * height * width_, hidden),
        nn.ReLU(),
        Dropout(0.5),
        nn.Linear(hidden, num_classes),
    )


def lenet(num_classes: int, image_size: tuple[int, int], width: float) -> nn.Module:
    """NIID-Bench's CNN: 62,006 parameters at 32x32 and width 1. It pads pictures under 16x16."""
    a, b, c, d = (max(1, round(width * n)) for n in (6, 16, 120, 84))
    padding = 0 if min(image_size) >= 16 else 2
    height, width_ = (((side - 4 + 2 * padding) // 2 - 4 + 2 * padding) // 2 for side in image_size)
    return nn.Sequential(
        nn.Conv2d(3, a, 5, padding=padding),
        nn.MaxPool2d(2),
        nn.ReLU(),  # after the pool, as in cnn()
        nn.Conv2d(a, b, 5, padding=padding),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(b * height * width_, c),
        nn.ReLU(),
        nn.Linear(c, d),
        nn.ReLU(),
        nn.Linear(d, num_classes),
    )


def build_network(
    name: str,
    num_classes: int,
    image_size: tuple[int, int],
    seed: int,
    stem: str = "cifar",
    norm: str = "batch",
    width: float = 1.0,
    tracks_statistics: bool = True,
) -> nn.Module:
    """Build a network whose initial weights depend on `seed` alone.

    norm: `batch` or `group(n)`. tracks_statistics: of BatchNorm; without them it has no buffers.
    Raises ValueError when the pieces do not fit together.
    """
    if min(image_size) < 8:
        raise ValueError(f"pictures of {image_size[0]}x{image_size[1]} are too small; at least 8x8")
    channels = max(1, round(64 * width))
    if norm == "batch":
        make_norm = partial(nn.BatchNorm2d, track_running_stats=tracks_statistics)
    else:
        groups = int(norm.removeprefix("group(").removesuffix(")"))
        if channels % groups:
            raise ValueError(f"model.norm: {norm} does not divide the {channels} channels")
        make_norm = partial(nn.GroupNorm, groups)
    settings = dict(num_classes=num_classes, stem=stem, norm=make_norm, width=channels)
    makers = {
        "resnet18": lambda: ResNet(BasicBlock, (2, 2, 2, 2), **settings),
        "resnet50": lambda: ResNet(Bottleneck, (3, 4, 6, 3), **settings),
        "resnet18v2": lambda: ResNetV2(**settings),
        "cnn": lambda: cnn(num_classes, image_size, width),
        "lenet": lambda: lenet(num_classes, image_size, width),
    }
    with torch.random.fork_rng(devices=[]):  # torch's initialisers draw from the global generator
        torch.manual_seed(seed)
        return makers[name]()
