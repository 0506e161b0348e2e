"""Networks, and their view as one flat vector.

ResNets are torchvision's blocks (He et al. 2016, arXiv 1512.03385) behind a stem that fits the
pictures. `cnn` is the network of pfl-research's CIFAR-10 benchmark, and `lenet` is that of
NIID-Bench (Li et al. 2022, arXiv 2102.02079). A FlatModel keeps all parameters in one contiguous
vector, so that receiving a model is one copy and an update one subtraction.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torchvision.models.resnet import BasicBlock, Bottleneck

from layout import Layout


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
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],  # blocks in each stage
        num_classes: int,
        stem: str = "cifar",  # cifar: 3x3; imagenet: 7x7 with stride 2, then a 3x3 max pool
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        width: int = 64,  # channels of the first stage
    ):
        super().__init__()
        kernel, stride, pool = {
            "cifar": (3, 1, nn.Identity()),
            "imagenet": (7, 2, nn.MaxPool2d(3, stride=2, padding=1)),
        }[stem]
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding=kernel // 2, bias=False)
        self.norm1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.pool = pool
        stages, channels = [], width
        for stage, depth in enumerate(depths):
            planes = width * 2**stage
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(_residual(block, channels, planes, stride, norm))
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
) -> nn.Module:
    """Build a network whose initial weights depend on `seed` alone.

    norm: `batch` or `group(n)`. Raises ValueError when the pieces do not fit together.
    """
    if min(image_size) < 8:
        raise ValueError(f"pictures of {image_size[0]}x{image_size[1]} are too small; at least 8x8")
    channels = max(1, round(64 * width))
    if norm == "batch":
        make_norm = nn.BatchNorm2d
    else:
        groups = int(norm.removeprefix("group(").removesuffix(")"))
        if channels % groups:
            raise ValueError(f"model.norm: {norm} does not divide the {channels} channels")
        make_norm = partial(nn.GroupNorm, groups)
    resnet = partial(ResNet, num_classes=num_classes, stem=stem, norm=make_norm, width=channels)
    makers = {
        "resnet18": lambda: resnet(BasicBlock, (2, 2, 2, 2)),
        "resnet50": lambda: resnet(Bottleneck, (3, 4, 6, 3)),
        "cnn": lambda: cnn(num_classes, image_size, width),
        "lenet": lambda: lenet(num_classes, image_size, width),
    }
    with torch.random.fork_rng(devices=[]):  # torch's initialisers draw from the global generator
        torch.manual_seed(seed)
        return makers[name]()


class Alignment:
    """Where the tensors of a layout lie in memory if each one starts at a multiple of 16 bytes.

    GPU kernels read four floats at once and fail at any other address. So up to three floats that
    belong to no tensor, a gap, follow a tensor whose size is no multiple of four.

    Attributes: size: floats in memory, from the first tensor's start to the last one's end; starts:
    int64 [num_tensors]; positions: int64 [layout.size], where in memory each entry of a gapless
    vector lies, or None if there are no gaps.
    """

    def __init__(self, layout: Layout, device: torch.device):
        sizes, offsets = torch.from_numpy(layout.sizes), torch.from_numpy(layout.offsets)
        rooms = (sizes + 3) // 4 * 4
        starts = rooms.cumsum(0) - rooms
        shifts = starts - offsets[:-1]  # how far each tensor moves; the last one moves furthest
        self.shapes, self.sizes, self.starts = layout.shapes, sizes.tolist(), starts.tolist()
        self.size = layout.size + int(shifts[-1:].sum())
        self.positions = None
        if self.size > layout.size:
            moved = torch.arange(layout.size) + shifts.repeat_interleave(sizes)
            self.positions = moved.to(device)

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors that lie in `memory` [..., >= size], in the shapes of the layout.

        Leading dimensions, such as one of clients, are theirs, too.
        """
        tensors = zip(self.starts, self.sizes, self.shapes, strict=True)
        return [
            memory[..., start : start + size].view((*memory.shape[:-1], *shape))
            for start, size, shape in tensors
        ]

    def spread(self, vector: Tensor) -> Tensor:
        """A gapless vector [layout.size] with gaps of zeros [size]; itself if there are none."""
        if self.positions is None:
            return vector
        return vector.new_zeros(self.size).index_copy_(0, self.positions, vector)

    def compact(self, memory: Tensor) -> Tensor:
        """The reverse of spread()."""
        return memory if self.positions is None else memory.index_select(0, self.positions)

    def write(self, memory: Tensor, vector: Tensor) -> None:
        """Copy a gapless vector into `memory`, from any device, and leave the gaps as they are."""
        if self.positions is None:
            memory.copy_(vector)
        else:
            memory.index_copy_(0, self.positions, vector.to(memory.device))


class FlatModel:
    """A network whose parameters, gradients and norm buffers are views into three flat vectors.

    `layout` and `buffer_layout` are gapless: they describe the vectors that travel. load() takes
    such vectors, read_parameters() and read_buffers() return them. Training works on the memory
    itself, in which every tensor starts at a multiple of 16 bytes (see Alignment). For most
    networks there are no gaps between the parameters, and the two are the same.

    Attributes: parameters, gradients: float32, the memory of the network, laid out as aligned()
    returns it; the gaps hold zeros. Writing there is writing to the network. An engine may leave
    gradients where autograd put them if nobody asks for the vector. buffers: the same for the
    norm buffers, float32, counters included (exact up to 2^24). is_counter, is_variance: bool
    [buffer_layout.size], on the CPU. frozen: BatchNorm normalises by its buffers in training too,
    and does not change them.
    """

    def __init__(self, network: nn.Module, device: torch.device, frozen: bool = False):
        self.network, self.device, self.frozen = network.to(device), device, frozen
        named = list(network.named_parameters())
        self.layout = _layout(named)
        self._alignment = Alignment(self.layout, device)
        self.parameters = self.aligned(torch.cat([p.detach().reshape(-1) for _, p in named]))
        self.gradients = torch.zeros_like(self.parameters)
        views = zip(named, self.views(self.parameters), self.views(self.gradients), strict=True)
        for (_, parameter), value, gradient in views:
            parameter.data, parameter.grad = value, gradient
        self._flatten_buffers()
        self._dropouts = [module for module in network.modules() if isinstance(module, Dropout)]
        for number, layer in enumerate(self._dropouts):
            layer.number = number

    def train(self) -> None:
        """Put the network into the mode of training."""
        self.network.train()
        for module in self.network.modules() if self.frozen else ():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def use_draws(self, draws: Draws) -> None:
        """Let dropout draw from these in the next forward pass."""
        for layer in self._dropouts:
            layer.draws = draws

    def load(self, parameters: Tensor, buffers: Tensor | None = None) -> None:
        """Copy gapless vectors [layout.size] and [buffer_layout.size] into the network.

        Without buffers the network keeps those that it has. The vectors may be on any device.
        """
        self._alignment.write(self.parameters, parameters)
        if buffers is not None:
            self._buffer_alignment.write(self.buffers, buffers)

    def read_parameters(self) -> Tensor:
        """The parameters, float32 [layout.size]; the network's own memory if it has no gaps."""
        return self.compact(self.parameters)

    def read_buffers(self) -> Tensor:
        """The norm buffers, float32 [buffer_layout.size]; like read_parameters()."""
        return self._buffer_alignment.compact(self.buffers)

    def aligned(self, vector: Tensor) -> Tensor:
        """A gapless vector over the parameters [layout.size], laid out as `parameters` is.

        Any dtype. Returns the vector itself if the memory has no gaps.
        """
        return self._alignment.spread(vector)

    def compact(self, aligned: Tensor) -> Tensor:
        """The reverse of aligned(): [layout.size], as vectors travel."""
        return self._alignment.compact(aligned)

    def views(self, aligned: Tensor) -> list[Tensor]:
        """The tensors of an aligned vector, in the shapes of the parameters.

        Of vectors in rows, [L, >= size], the tensors are stacked, too.
        """
        return self._alignment.views(aligned)

    def buffer_views(self, aligned: Tensor) -> list[Tensor]:
        """The same of a vector that is laid out as `buffers` is, or of such rows."""
        return self._buffer_alignment.views(aligned)

    def norm_positions(self) -> Tensor:
        """Where in a gapless vector the weights and biases of the norm layers are.

        int64, ascending.
        """
        is_norm = {
            name: isinstance(module, nn.BatchNorm2d | nn.GroupNorm)
            for name, module in self.network.named_modules()
        }
        chosen = [is_norm[name.rpartition(".")[0]] for name in self.layout.names]
        sizes = torch.from_numpy(self.layout.sizes)
        return torch.tensor(chosen).repeat_interleave(sizes).nonzero().flatten()

    def _flatten_buffers(self) -> None:
        named = list(self.network.named_buffers())
        self.buffer_layout = _layout(named)
        self._buffer_alignment = Alignment(self.buffer_layout, self.device)
        nothing = torch.zeros(0, device=self.device)
        flat = torch.cat([nothing, *(buffer.reshape(-1).float() for _, buffer in named)])
        self.buffers = self._buffer_alignment.spread(flat)
        sizes = torch.from_numpy(self.buffer_layout.sizes)
        # Counters such as num_batches_tracked are not averaged; their maximum is taken.
        self.is_counter, self.is_variance = (
            torch.tensor(marks, dtype=torch.bool).repeat_interleave(sizes)
            for marks in (
                [not buffer.is_floating_point() for _, buffer in named],
                [name.endswith("running_var") for name, _ in named],
            )
        )
        views = self._buffer_alignment.views(self.buffers)
        for (name, _), view in zip(named, views, strict=True):
            owner, _, leaf = name.rpartition(".")
            # .data, because autograd must not take one layer's new statistics for a change of
            # another's.
            self.network.get_submodule(owner)._buffers[leaf] = view.data


def _layout(named: list[tuple[str, Tensor]]) -> Layout:
    return Layout(tuple(name for name, _ in named), tuple(tuple(t.shape) for _, t in named))
