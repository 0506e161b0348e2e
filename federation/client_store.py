"""What clients keep between rounds, a dict of tensors each, in a set amount of memory.

States are staged while a round is under way and take effect with commit(), so that a round that is
abandoned leaves nothing behind. Up to `budget` bytes of them wait in memory; beyond it the least
recently used go to the disk. What is on the disk is read through a memory map, so the operating
system's page cache is its cache: fast while memory is free, given back when it is not.

A state's version is the round that made it, its file is <client>-<version>.pt, and no file is ever
changed (copy-on-write): the files that a checkpoint names stay whole until the next one stands, and
a checkpoint costs only what changed since the last.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import RLock
from typing import Any, TypedDict

import torch
from torch import Tensor


class State(TypedDict, total=False):
    """What a client keeps between rounds, float32 vectors."""

    residual: Tensor  # [num_parameters]: what it owes, see channel.ErrorFeedback
    velocity: Tensor  # [num_parameters]: of DGC's momentum correction
    algorithm: Tensor  # [num_parameters]: what its algorithm keeps
    norm: Tensor  # FedBN: the weights of its own norm layers, then all buffers


OVER_COORDINATES = ("residual", "velocity", "algorithm")  # what a mask takes weights from
NUM_THREADS = 32


class ClientStore:
    """The states of the clients that one rank trains.

    folder: of all ranks' files; budget: bytes of states to hold in memory at most; versions: those
    of the checkpoint to go on from. Spilling raises OSError where the disk is full. Any thread may
    read and stage states; what else happens to them is one thread's work.
    """

    def __init__(self, folder: Path, budget: float, versions: dict[int, int] | None = None):
        self.folder, self.budget = folder, budget
        self.versions = dict(versions or {})  # client: the version that get() returns
        self.staged: dict[int, int] = {}  # client: the version that commit() makes valid
        self.changed: set[int] = set()  # clients with a commit() since the last save()
        self.replaced: list[Path] = []  # files that only the checkpoint on the disk needs
        self.memory: dict[tuple[int, int], State] = {}  # not on the disk; last used, last in line
        self.bytes_in_memory = 0
        self._lock = RLock()  # threads that encode stage states while another one trains
        # int32 [num_parameters]: the round in which each weight last left the mask; 0 for never
        self.last_left = torch.zeros(0, dtype=torch.int32)

    def get(self, client: int) -> State:
        """The client's state, to be read and not written; empty if it has none.

        Of weights that have left the mask since the state was made, it holds zeros, even if they
        are back.
        """
        if client not in self.versions:
            return {}
        state, version = self._read(client, self.versions[client]), self.versions[client]
        left = self.last_left > version
        if not left.any():
            return state
        return state | {
            key: state[key].masked_fill(left.to(state[key].device), 0.0)
            for key in OVER_COORDINATES
            if key in state
        }

    def forget(self, left: Tensor, num_coordinates: int, round_number: int) -> None:
        """The weights at these positions, int64, are not on the mask of this round any more."""
        if not len(self.last_left):
            self.last_left = torch.zeros(num_coordinates, dtype=torch.int32)
        self.last_left[left] = round_number

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
            self.memory[client, round] = state
            self.bytes_in_memory += _num_bytes(state)
            self.make_room(0)

    def make_room(self, num_bytes: int) -> None:
        """Spill until this much of the budget is free, or all of it: for a state to come."""
        with self._lock:
            while self.memory and self.bytes_in_memory + num_bytes > self.budget:
                self._spill(*next(iter(self.memory)))

    def release(self, client: int) -> tuple[int, bool]:
        """Put a client's state on the disk and forget it, so that another store may adopt() it."""
        version, changed = self.versions.pop(client), client in self.changed
        if (client, version) in self.memory:
            self._spill(client, version)
        self.changed.discard(client)
        return version, changed

    def adopt(self, client: int, version: int, changed: bool) -> None:
        """Take over a state that another store of the same folder has released."""
        self.versions[client] = version
        if changed:
            self.changed.add(client)

    def commit(self) -> None:
        """The round happened: what is staged is valid now."""
        for client, version in self.staged.items():
            if client in self.changed:
                self._drop(client, self.versions[client])
            elif client in self.versions:
                self.replaced.append(self._path(client, self.versions[client]))
            self.versions[client] = version
        self.changed |= self.staged.keys()
        self.staged = {}

    def discard(self) -> None:
        """The round never happened."""
        for client, version in self.staged.items():
            self._drop(client, version)
        self.staged = {}

    def save(self) -> dict[int, int]:
        """Put what changed since the last save on the disk for good; return its versions.

        A checkpoint that names them may follow, and once it stands, drop_replaced().
        """
        changed = {client: self.versions[client] for client in sorted(self.changed)}
        self.folder.mkdir(exist_ok=True)
        for key in self.memory.keys() & changed.items():
            self._spill(*key)
        _at_once(sync, [self._path(*key) for key in changed.items()])
        sync(self.folder)
        self.changed = set()
        return changed

    def drop_replaced(self) -> None:
        """Delete what only the checkpoint before needed."""
        _at_once(Path.unlink, self.replaced)
        self.replaced = []

    def _read(self, client: int, version: int) -> State:
        with self._lock:
            if (state := self.memory.pop((client, version), None)) is not None:
                self.memory[client, version] = state  # now the last in line
                return state
        return torch.load(
            self._path(client, version), weights_only=True, mmap=True, map_location="cpu"
        )

    def _spill(self, client: int, version: int) -> None:
        self.folder.mkdir(exist_ok=True)
        write_tensors(self._path(client, version), self.memory[client, version])
        self.bytes_in_memory -= _num_bytes(self.memory.pop((client, version)))

    def _drop(self, client: int, version: int) -> None:
        state = self.memory.pop((client, version), None)
        if state is None:
            self._path(client, version).unlink()
        else:
            self.bytes_in_memory -= _num_bytes(state)

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
