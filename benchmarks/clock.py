"""The event clock beside real transfers over links whose rates Linux limits.

    sudo python benchmarks/clock.py [--rates 1 2 5 10 20 50] [--sizes 0.4 1.3 4.5] [--server 60]

Makes a network namespace for a server, for a router and for each client, joins them by virtual
Ethernet, and limits each direction of each link by `tc tbf`, the server's by `--server`. For each
size in MB the server sends a payload to all clients at once, over TCP; each client sends one of the
same size back as soon as it has it all. The table has a row for each client and size: simulated and
measured seconds of the download and of the upload. The error is over the measured seconds. The
default sizes are those of a real run's payloads, 0.4, 4 and 45 MB, in parts that are quick.
"""

import argparse
import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from devices import device_name

from network.population import Population
from network.simulation import Simulation, Stage

NEW_NETWORK = 0x40000000  # CLONE_NEWNET of linux/sched.h
BURST = 3028  # bytes that a limited link may send at once: two full frames
QUEUE = 400_000  # bytes that wait before a limited link


def missing() -> str:
    """What this machine lacks for namespaces with limited links; "" for nothing."""
    for tool in ("ip", "tc"):
        if not shutil.which(tool):
            return f"there is no `{tool}`; install iproute2"
    return "" if os.geteuid() == 0 else "network namespaces need root; run this with sudo"


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"`{' '.join(words)}` fails here: {done.stderr.strip()}")


# --- real links -----------------------------------------------------------------------------------


@contextmanager
def star(rates: list[float], server_mbps: float) -> Iterator[list[tuple[socket.socket, ...]]]:
    """Give for each client the two ends of a connection: the server's and the client's."""
    prefix = f"clock{os.getpid()}"
    server, router = f"{prefix}s", f"{prefix}r"
    clients = [f"{prefix}c{client}" for client in range(len(rates))]
    with ExitStack() as undo:
        for space in (server, router, *clients):
            run("ip", "netns", "add", space)
            undo.callback(run, "ip", "netns", "delete", space)  # its cards go with it
        forward = "echo 1 > /proc/sys/net/ipv4/ip_forward"
        run("ip", "netns", "exec", router, "sh", "-c", forward)
        for number, (space, mbps) in enumerate([(server, server_mbps), *zip(clients, rates)]):
            join(space, router, number, mbps)
        yield [connect(server, space, undo) for space in clients]


def join(space: str, router: str, number: int, mbps: float) -> None:
    """Make a link between a machine and the router, limited both ways."""
    card = f"link{number}"
    peer = ["type", "veth", "peer", "name", card, "netns", router]
    run("ip", "link", "add", card, "netns", space, *peer)
    for place, host in ((space, 1), (router, 2)):
        run("ip", "-n", place, "addr", "add", f"10.79.{number}.{host}/24", "dev", card)
        run("ip", "-n", place, "link", "set", card, "up")
        limit = ["rate", f"{mbps}mbit", "burst", str(BURST), "limit", str(QUEUE)]
        run("tc", "-n", place, "qdisc", "add", "dev", card, "root", "handle", "1:", "tbf", *limit)
    run("ip", "-n", space, "route", "add", "default", "via", f"10.79.{number}.2")


def connect(server: str, client: str, undo: ExitStack) -> tuple[socket.socket, socket.socket]:
    listening = undo.enter_context(socket_in(server))
    listening.bind(("10.79.0.1", 0))
    listening.listen()
    near = undo.enter_context(socket_in(client))
    near.connect(listening.getsockname())
    return undo.enter_context(listening.accept()[0]), near


def socket_in(space: str) -> socket.socket:
    """A TCP socket of a network namespace, where it stays wherever this process goes."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as home, open(f"/var/run/netns/{space}") as there:
        for entered in (there, home):
            if libc.setns(entered.fileno(), NEW_NETWORK):
                raise OSError(ctypes.get_errno(), "setns fails here", space)
            if entered is there:
                made = socket.socket()
    return made


def measure(ends: list[tuple[socket.socket, ...]], num_bytes: int) -> np.ndarray:
    """Send down and up at once for all clients: seconds (clients, 2), when each has arrived."""
    arrived = np.zeros((len(ends), 2))
    payload, begun = bytes(num_bytes), []
    barrier = threading.Barrier(2 * len(ends), lambda: begun.append(time.perf_counter()))

    def serve(client: int, end: socket.socket) -> None:
        barrier.wait()
        end.sendall(payload)
        receive(end, num_bytes)
        arrived[client, 1] = time.perf_counter()

    def answer(client: int, end: socket.socket) -> None:
        barrier.wait()
        receive(end, num_bytes)
        arrived[client, 0] = time.perf_counter()
        end.sendall(payload)

    threads = [
        threading.Thread(target=work, args=(client, end), daemon=True)
        for client, pair in enumerate(ends)
        for work, end in zip((serve, answer), pair, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return arrived - begun[0]


def receive(end: socket.socket, num_bytes: int) -> None:
    while num_bytes:
        got = len(end.recv(min(num_bytes, 1 << 16)))
        if not got:
            raise ConnectionError("the other end has closed the connection")
        num_bytes -= got


# --- the simulation beside it ---------------------------------------------------------------------


def simulate(rates: list[float], server_mbps: float, num_bytes: int) -> np.ndarray:
    """The same seconds by the event clock."""
    mbps, none = np.array(rates), np.zeros(len(rates))
    names = np.full(len(rates), "tc")
    people = Population(mbps, mbps, none, none, none, none, none, names, names)
    simulation = Simulation(people, server_mbps, server_mbps)
    for client in range(len(rates)):
        simulation.start(client, [Stage("down", num_bytes), Stage("up", num_bytes)])
    while simulation.advance():
        pass
    arrived = np.zeros((len(rates), 2))
    for span in simulation.spans:
        arrived[span.client, span.stage] = span.end
    return arrived


def compare(rates: list[float], sizes: list[float], server_mbps: float) -> list[dict]:
    rows = []
    with star(rates, server_mbps) as ends:
        for size in sizes:
            num_bytes = round(1e6 * size)
            simulated = simulate(rates, server_mbps, num_bytes)
            measured = measure(ends, num_bytes)
            times = [np.diff(arrived, axis=1, prepend=0) for arrived in (simulated, measured)]
            for mbps, ours, real in zip(rates, *times, strict=True):
                for direction, expected, seconds in zip(("down", "up"), ours, real, strict=True):
                    row = {"megabytes": size, "mbps": mbps, "direction": direction}
                    row |= {"simulated": float(expected), "measured": float(seconds)}
                    rows.append(row | {"error": abs(expected - seconds) / seconds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", nargs="+", type=float, default=[1, 2, 5, 10, 20, 50])
    parser.add_argument("--sizes", nargs="+", type=float, default=[0.4, 1.3, 4.5], help="in MB")
    parser.add_argument("--server", type=float, default=60.0, help="Mbit/s of the server's link")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    given = parser.parse_args()
    if min(*given.rates, *given.sizes, given.server) <= 0:
        parser.exit(2, "error: rates and sizes must be above 0\n")
    if lacks := missing():
        parser.exit(2, f"error: {lacks}\n")
    try:
        rows = compare(given.rates, given.sizes, given.server)
    except OSError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{'MB':>6} {'Mbit/s':>7} {'way':>5} {'simulated s':>12} {'measured s':>11} {'error':>7}")
    for row in rows:
        print(
            f"{row['megabytes']:6g} {row['mbps']:7g} {row['direction']:>5} "
            f"{row['simulated']:12.3f} {row['measured']:11.3f} {row['error']:7.1%}"
        )
    worst = max(row["error"] for row in rows)
    print(f"worst error: {worst:.1%}")
    if given.json:
        device = device_name(torch.device("cpu"))
        print(json.dumps({"worst_error": worst, "device": device, "rows": rows}))


if __name__ == "__main__":
    main()
