"""A network as flat vectors: its parameters, gradients and norm buffers each lie in one.

So receiving a model is one copy, an update one subtraction, and a server's step one kernel.
"""

from functools import cached_property

import torch
from torch import Tensor, nn

from cnn_model import Draws, Dropout
from layout import Layout


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

    @cached_property
    def head_bias(self) -> Tensor:
        """What the last linear layer adds to the logits, float32 [num_classes]: a view."""
        layers = [name for name, m in self.network.named_modules() if isinstance(m, nn.Linear)]
        return self.views(self.parameters)[self.layout.names.index(f"{layers[-1]}.bias")]

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
