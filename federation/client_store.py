"""What clients keep between rounds, a dict of tensors each, in a set amount of memory.

States are staged while a round is under way and take effect with commit(), so that a round that is
abandoned leaves nothing behind. Up to `budget` bytes of them stay in a GPU's memory; beyond it the
least recently used go to the computer's memory, up to as many bytes, and then to the disk. What is
on the disk is read through a memory map, so the operating system's page cache is its cache: fast
while memory is free, given back when it is not.

A state's version is the round that made it, its file is <client>-<version>.pt, and no file is ever
changed (copy-on-write): the files that a checkpoint names stay whole until the next one stands, and
a checkpoint costs only what changed since the last.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import RLock
from typing import Any, TypedDict

import torch
from torch import Tensor

from compression import to_host


class State(TypedDict, total=False):
    """What a client keeps between rounds, float32 vectors.

    Of its optimizer, besides: what each parameter has, as optimizer.<number>.<name>, in any shape.
    """

    residual: Tensor  # [num_parameters]: what it owes, see channel.ErrorFeedback
    velocity: Tensor  # [num_parameters]: of DGC's momentum correction
    algorithm: Tensor  # [num_parameters]: what its algorithm keeps
    copy: Tensor  # [num_parameters]: the model as it has it, see downlink.Copies
    norm: Tensor  # FedBN: the weights of its own norm layers, then all buffers
    model: Tensor  # gossip, [num_parameters]: of this node
    buffers: Tensor  # gossip, [num_buffers]: of this node
    estimate: Tensor  # CHOCO-SGD, [num_parameters]: what its neighbours know of the model
    pull: Tensor  # CHOCO-SGD, [num_parameters]: how far the neighbours' estimates are from its own


OWED = ("residual", "velocity")  # what error feedback keeps
NUM_THREADS = 32
Key = tuple[int, int]  # a client and the version of its state


class Shelf:
    """States in one kind of memory, the least recently used first, in at most `budget` bytes."""

    def __init__(self, budget: float):
        self.budget, self.num_bytes = budget, 0
        self.states: dict[Key, State] = {}

    def put(self, key: Key, state: State) -> None:
        self.states[key] = state
        self.num_bytes += _num_bytes(state)

    def pop(self, key: Key) -> State | None:
        """Remove a state and return it; None if it is not here."""
        state = self.states.pop(key, None)
        self.num_bytes -= _num_bytes(state or {})
        return state

    def use(self, key: Key) -> State | None:
        """A state, which is the last in line from now on; None if it is not here."""
        if key in self.states:
            self.states[key] = self.states.pop(key)
        return self.states.get(key)

    def give_way(self, num_bytes: int) -> Iterator[tuple[Key, State]]:
        """Remove states until so many bytes more would fit, or none is left."""
        while self.states and self.num_bytes + num_bytes > self.budget:
            key = next(iter(self.states))
            yield key, self.pop(key)


class ClientStore:
    """The states of the clients that one rank trains.

    folder: of all ranks' files; budget: bytes of states to hold at most in a GPU's memory, if there
    is one, and in the computer's; versions: those of the checkpoint to go on from. Spilling raises
    OSError where the disk is full. Any thread may read and stage states; what else happens to them
    is one thread's work.
    """

    def __init__(
        self,
        folder: Path,
        budget: float,
        versions: dict[int, int] | None = None,
        has_gpu: bool = False,
    ):
        self.folder = folder
        self.on_gpu, self.on_host = Shelf(budget if has_gpu else 0), Shelf(budget)
        self.saved: set[Key] = set()  # of the states in the GPU's memory: those that have a file
        self.versions = dict(versions or {})  # client: the version that get() returns
        self.staged: dict[int, int] = {}  # client: the version that commit() makes valid
        self.advanced: dict[int, int] = {}  # likewise, from the parts of a round that are over
        self.changed: set[int] = set()  # clients with a commit() since the last save()
        self.replaced: list[Path] = []  # files that only the checkpoint on the disk needs
        self._lock = RLock()  # threads that encode stage states while another one trains
        self.use_mask(None, 0)

    def use_mask(self, pruned: Tensor | None, round_number: int) -> None:
        """From this round on, the weights where bool [num_parameters] is true do not exist."""
        self.pruned, self.mask_round = pruned, round_number

    def is_older_than_mask(self, client: int) -> bool:
        """Whether the client has a state, and the mask has changed since it was made."""
        return self.versions.get(client, self.mask_round) < self.mask_round

    def get(self, client: int) -> State:
        """The client's state, to be read and not written; empty if it has none.

        Nothing is owed of weights that do not exist now. Of one that left and came back while the
        client was away, all is owed that was: the client has never heard of it.
        """
        version = self.advanced.get(client, self.versions.get(client))
        if version is None:
            return {}
        state = self._read(client, version)
        if not self.is_older_than_mask(client):
            return state
        return state | {
            key: state[key].masked_fill(self.pruned.to(state[key].device), 0.0)
            for key in OWED
            if key in state
        }

    def get_staged(self, client: int) -> State:
        return self._read(client, self.staged[client])

    def stage(self, client: int, state: State, round: int) -> None:
        """Set what the client keeps if `round` happens; a state that was staged before gives way.

        The store keeps the tensors themselves: do not write to them afterwards.
        """
        with self._lock:
            if client in self.staged:
                self._drop(client, self.staged.pop(client))
            self.staged[client] = round
            self.on_gpu.put((client, round), state)
            self.make_room(0)

    def make_room(self, num_bytes: int) -> None:
        """Spill until this much of the budget is free, or all of it: for a state to come."""
        with self._lock:
            for key, state in self.on_gpu.give_way(num_bytes):
                if key in self.saved:
                    self.saved.discard(key)
                else:
                    self.on_host.put(key, {name: to_host(part) for name, part in state.items()})
            for key, state in self.on_host.give_way(0 if self.on_gpu.budget else num_bytes):
                self._write(key, state)

    def release(self, client: int) -> tuple[int, bool]:
        """Put a client's state on the disk and forget it, so that another store may adopt() it."""
        version, changed = self.versions.pop(client), client in self.changed
        key = client, version
        if (state := self._pop(key)) is not None and key not in self.saved:
            self._write(key, state)
        self.saved.discard(key)
        self.changed.discard(client)
        return version, changed

    def adopt(self, client: int, version: int, changed: bool) -> None:
        """Take over a state that another store of the same folder has released."""
        self.versions[client] = version
        if changed:
            self.changed.add(client)

    def advance(self) -> None:
        """A part of a round is over: get() returns what is staged, until discard()."""
        for client, version in self.staged.items():
            if client in self.advanced:
                self._drop(client, self.advanced[client])
            self.advanced[client] = version
        self.staged = {}

    def commit(self) -> None:
        """The round happened: what is staged is valid now."""
        self.advance()
        for client, version in self.advanced.items():
            if client in self.changed:
                self._drop(client, self.versions[client])
            elif client in self.versions:
                before = client, self.versions[client]
                self._pop(before)
                self.saved.discard(before)
                self.replaced.append(self._path(*before))
            self.versions[client] = version
        self.changed |= self.advanced.keys()
        self.advanced = {}

    def discard(self) -> None:
        """The round never happened."""
        for client, version in (*self.staged.items(), *self.advanced.items()):
            self._drop(client, version)
        self.staged, self.advanced = {}, {}

    def save(self) -> dict[int, int]:
        """Put what changed since the last save on the disk for good; return its versions.

        A checkpoint that names them may follow, and once it stands, drop_replaced().
        """
        changed = {client: self.versions[client] for client in sorted(self.changed)}
        self.folder.mkdir(exist_ok=True)
        for key in changed.items():
            if key in self.on_gpu.states:
                self._write(key, self.on_gpu.states[key])
                self.saved.add(key)
            elif (state := self.on_host.pop(key)) is not None:
                self._write(key, state)
        _at_once(sync, [self._path(*key) for key in changed.items()])
        sync(self.folder)
        self.changed = set()
        return changed

    def drop_replaced(self) -> None:
        """Delete what only the checkpoint before needed."""
        _at_once(Path.unlink, self.replaced)
        self.replaced = []

    def _read(self, client: int, version: int) -> State:
        key = client, version
        with self._lock:
            if (state := self.on_gpu.use(key) or self.on_host.use(key)) is not None:
                return state
        return torch.load(
            self._path(client, version), weights_only=True, mmap=True, map_location="cpu"
        )

    def _pop(self, key: Key) -> State | None:
        """Take a state out of memory; None if it is on the disk alone."""
        state = self.on_gpu.pop(key)
        return self.on_host.pop(key) if state is None else state

    def _write(self, key: Key, state: State) -> None:
        self.folder.mkdir(exist_ok=True)
        write_tensors(self._path(*key), {name: to_host(part) for name, part in state.items()})

    def _drop(self, client: int, version: int) -> None:
        """Forget a state that no checkpoint names."""
        if self._pop((client, version)) is None:
            self._path(client, version).unlink()

    def _path(self, client: int, version: int) -> Path:
        return self.folder / f"{client}-{version}.pt"


def remove_old_states(folder: Path, versions: dict[int, int]) -> None:
    """Delete what a run left behind that no checkpoint names: versions is {client: version}."""
    keep = {f"{client}-{version}.pt" for client, version in versions.items()}
    for path in folder.glob("*.pt"):
        if path.name not in keep:
            path.unlink()


def write_tensors(path: Path, content: Any) -> None:
    """torch.save, but a full disk is an OSError that names the file."""
    try:
        with open(path, "wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch's writer hides the OSError of its file
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _at_once(work: Callable[[Path], None], paths: list[Path]) -> None:
    """Do it to all files together: a file system that journals is many times faster so."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(work, paths))


def _num_bytes(state: State) -> int:
    """A view keeps its whole storage alive, so that is what counts."""
    return sum(tensor.untyped_storage().nbytes() for tensor in state.values())
