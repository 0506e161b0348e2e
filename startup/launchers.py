"""Launchers: which process this is, and how the processes that they started find each other.

torchrun, accelerate launch and the deepspeed launcher start the same program several times and
give each process RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

import os
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from ipaddress import ip_address
from threading import Thread
from typing import TypeVar

import psutil
import torch.distributed as dist

from config import ConfigError

T = TypeVar("T")
INTERNET = (socket.AF_INET, socket.AF_INET6)
START_SECONDS = 60  # by then all processes must have come and be connected to each other
ADVICE = (
    "start with torchrun, accelerate launch or deepspeed, or give each process RANK, WORLD_SIZE, "
    "LOCAL_RANK, MASTER_ADDR and MASTER_PORT (docs/ranks.md)"
)
# Launchers that say how many processes there are, but in variables that torch does not read.
OTHER_LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "SLURM_STEP_NUM_TASKS": "srun",
}


@dataclass(frozen=True)
class Launch:
    """Which process of a run this is, and where the processes meet."""

    rank: int = 0
    size: int = 1  # the number of processes
    address: str = ""  # of the master, the machine of rank 0
    port: int = 0


def read_launch(on_cpu: bool) -> Launch:
    """Read the launcher's variables; without them this is the only process.

    Raises ConfigError, which names the variable, where they are incomplete or impossible.
    """
    if not os.environ.get("WORLD_SIZE"):
        _refuse_strangers()
    size = _whole_number("WORLD_SIZE", 1, default="1")
    rank = _whole_number("RANK", 0, size - 1, default=None if size > 1 else "0")
    if size == 1:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", *OTHER_LAUNCHERS):
            os.environ.pop(name, None)  # with these Accelerate would wait for other processes
        return Launch()
    if not on_cpu:
        _whole_number("LOCAL_RANK", 0)  # Accelerate chooses the GPU by it
    if not os.environ.get("MASTER_ADDR"):
        raise ConfigError(f"MASTER_ADDR is not set, but WORLD_SIZE is {size}; {ADVICE}")
    return Launch(rank, size, os.environ["MASTER_ADDR"], _whole_number("MASTER_PORT", 1, 65535))


def _refuse_strangers() -> None:
    """Without WORLD_SIZE each of several processes would do the whole run, all in one folder."""
    for name, launcher in OTHER_LAUNCHERS.items():
        number = os.environ.get(name) or "1"
        if number != "1":
            raise ConfigError(
                f"{name} is {number}, but WORLD_SIZE is not set, so the processes of {launcher} do "
                f"not know each other; {ADVICE}, or set WORLD_SIZE=1 for {number} separate runs"
            )
    if rank := os.environ.get("RANK"):
        raise ConfigError(f"RANK is {rank}, but WORLD_SIZE is not set; {ADVICE}")
    if os.environ.get("MASTER_ADDR"):  # `accelerate launch --num_processes 2` without GPUs
        warn(
            "MASTER_ADDR is set, but WORLD_SIZE is not, so this process trains alone; to start "
            "several on CPUs use torchrun or `accelerate launch --multi_gpu`"
        )


def _whole_number(
    name: str, least: int, most: int | None = None, default: str | None = None
) -> int:
    """The value of an environment variable."""
    text = os.environ.get(name) or default
    if text is None:
        size = os.environ["WORLD_SIZE"]
        raise ConfigError(f"{name} is not set, but WORLD_SIZE is {size}; {ADVICE}")
    number = int(text) if text.isdecimal() else -1
    if number < least or (most is not None and number > most):
        bounds = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name} is {text!r}, but must be a whole number {bounds}")
    return number


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def join(launch: Launch, backend: str, timeout: timedelta) -> None:
    """Meet the other processes at the master and make torch's process group of all.

    timeout: of the group's collectives. Raises ConfigError if the launcher's variables contradict
    each other, and TimeoutError if a process is missing or out of reach after START_SECONDS.
    """
    end = time.monotonic() + START_SECONDS

    def by_then(work: Callable[[], T], complaint: str) -> T:
        return in_time(work, complaint, end - time.monotonic())

    place = f"MASTER_ADDR {launch.address}, MASTER_PORT {launch.port}"
    hosts = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = _host_store(launch, timeout) if hosts else None
    own, master = by_then(partial(_reach_master, launch), f"nothing answers at {place}")
    if store is None:
        store = by_then(
            lambda: dist.TCPStore(
                launch.address, launch.port, timeout=timeout, wait_for_workers=False
            ),
            f"what answers at {place} is not rank 0 of this run",
        )
    # torchrun keeps its store over a restart: addresses in it would be those of the dead.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    choose_interface(own, meet(launch, store, master, end))
    by_then(
        lambda: dist.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.size, timeout=timeout
        ),
        "the processes cannot connect to each other; a firewall may be between them, or "
        "GLOO_SOCKET_IFNAME must name another network interface",
    )


def in_time(work: Callable[[], T], complaint: str, seconds: float = START_SECONDS) -> T:
    """Do `work` in a thread; raise TimeoutError if it takes longer.

    torch's own limits do not hold: a TCPStore waits for ever where another program listens.
    """
    result = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    if not wait([result], max(0.0, seconds)).done:
        raise TimeoutError(f"{complaint} (gave up after {START_SECONDS} s)")
    return result.result()


def _host_store(launch: Launch, timeout: timedelta) -> dist.TCPStore:
    """The table in which the processes meet; rank 0 holds it unless torchrun does."""
    try:
        return dist.TCPStore(
            "127.0.0.1", launch.port, None, True, timeout, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistNetworkError as error:
        reason = str(error).rpartition("message: ")[2]
        raise ConfigError(f"MASTER_PORT is {launch.port}: {reason}; choose another") from None


def _reach_master(launch: Launch) -> tuple[str, str]:
    """Connect to the master as soon as it listens; return our address and the master's."""
    while True:
        try:
            with socket.create_connection((launch.address, launch.port)) as connection:
                return connection.getsockname()[0], connection.getpeername()[0]
        except OSError:  # it does not listen yet, or its name is not known yet
            time.sleep(0.1)


def meet(launch: Launch, store: dist.Store, master: str, end: float) -> list[str]:
    """Wait for all processes; return the address by which each of them knows the master."""
    if store.add(f"rank {launch.rank}", 1) > 1:
        raise ConfigError(f"RANK is {launch.rank} in two processes; give each its own")
    size = int(store.compare_set("size", "", str(launch.size)))
    if size != launch.size:
        raise ConfigError(f"WORLD_SIZE is {launch.size}, but {size} in another process of this run")
    store.set(f"master of {launch.rank}", master)
    store.add("started", 1)
    while store.add("started", 0) < size:
        if time.monotonic() > end:
            missing = [str(r) for r in range(size) if not store.check([f"master of {r}"])]
            raise TimeoutError(
                f"rank {', '.join(missing)} of {size} did not start within {START_SECONDS} s"
            )
        time.sleep(0.05)
    return [store.get(f"master of {rank}").decode() for rank in range(size)]


def choose_interface(own: str, masters: list[str]) -> None:
    """Let gloo and NCCL use the network interface that leads to the master.

    By itself gloo takes the address of the host name, which on Debian and Ubuntu is 127.0.1.1.
    own: the address from which this machine reaches the master; masters: see meet().
    """
    interfaces = {
        name: [known.address.partition("%")[0] for known in addresses if known.family in INTERNET]
        for name, addresses in psutil.net_if_addrs().items()
    }
    if given := os.environ.get("GLOO_SOCKET_IFNAME"):
        usable = [name for name, addresses in interfaces.items() if addresses]
        if not set(given.split(",")) <= set(usable):
            raise ConfigError(
                f"GLOO_SOCKET_IFNAME is {given}, but the network interfaces here are "
                f"{', '.join(usable)}"
            )
    if given or os.environ.get("NCCL_SOCKET_IFNAME"):
        return
    elsewhere = [address for address in masters if not _is_loopback(address)]
    if _is_loopback(own) and elsewhere:  # other machines know the master by its real address
        with suppress(OSError):  # there may be no way to that address from here
            own = source_address(elsewhere[0])
    for name, addresses in interfaces.items():
        if own in addresses:
            os.environ["GLOO_SOCKET_IFNAME"] = name
            os.environ["NCCL_SOCKET_IFNAME"] = f"={name}"  # "=": exactly this name


def _is_loopback(address: str) -> bool:
    return ip_address(address).is_loopback


def source_address(destination: str) -> str:
    """This machine's address in packets to another; none is sent."""
    family = socket.AF_INET6 if ":" in destination else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((destination, 9))
        return probe.getsockname()[0]
