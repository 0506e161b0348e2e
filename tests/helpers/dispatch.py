"""Modes that see every operation of torch, those of autograd and vmap included; a fake graph."""

from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The device would have to be waited for: the host asks for a value, or for a size that hangs on it.
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}
WAITS |= {"scalar_tensor"}  # a number in the place of a tensor, which is copied to the device


class NoWaiting(TorchDispatchMode):
    """Fails where the host waits for the device, or copies something to it or from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        assert name not in WAITS, f"{name} waits for the device"
        devices = {leaf.device for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        assert len(devices) < 2, f"{name} mixes devices"
        if kwargs.get("device") not in (None, *devices) and devices:
            assert kwargs.get("non_blocking"), f"{name} copies to another device and waits"
        if name.startswith("index"):
            indices = [leaf for leaf in tree_leaves(args[1:]) if torch.is_tensor(leaf)]
            assert all(leaf.dtype != torch.bool for leaf in indices), "an unknown number of entries"
        return func(*args, **kwargs)


class Addresses(TorchDispatchMode):
    """Notes the memory that operations touch and that they have not made themselves: `outside`."""

    def __init__(self):
        super().__init__()
        self.outside: set[int] = set()
        self.made: dict[int, torch.Tensor] = {}  # held, so that no address is used again

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.outside |= {
            address for address, _ in memory((args, kwargs)) if address not in self.made
        }
        result = func(*args, **(kwargs or {}))
        for address, tensor in memory(result):
            if address not in self.outside:
                self.made[address] = tensor
        return result


def memory(tree) -> Iterator[tuple[int, torch.Tensor]]:
    for leaf in tree_leaves(tree):
        if torch.is_tensor(leaf) and leaf.untyped_storage().nbytes():
            yield leaf.untyped_storage().data_ptr(), leaf


class StandIn:
    """Records a step as a CUDA graph does: runs it some times, then replays the same closure.

    Attribute `touched`: for each recording, the outside addresses of each replay.
    """

    def __init__(self):
        self.touched: list[list[set[int]]] = []

    def __call__(self, step):
        for _ in range(4):
            step()
        replays: list[set[int]] = []
        self.touched.append(replays)

        def replay():
            with Addresses() as mode:
                result = step()
            replays.append(mode.outside)
            return result

        return replay
