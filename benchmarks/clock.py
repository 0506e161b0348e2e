"""The event clock beside real transfers over links whose rates Linux limits.

    sudo python benchmarks/clock.py [--rates 1 2 5 10 20 50] [--sizes 0.4 1.3 4.5] [--json]

Makes a network namespace for a server, for a router and for each client, joins them by virtual
Ethernet, and limits each direction of each client's link by `tc tbf`. For each size in MB the
server sends a payload to all clients at once, over TCP; each client sends one of the same size back
as soon as it has it all. The table has a row for each message: simulated and measured seconds, and
the error over the measured ones. A real run's payloads have 0.4, 4 and 45 MB; the default sizes are
those that are quick.

With --server the server's link is limited, too, by `tc htb`, which serves the clients in turn.
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

Ends = tuple[socket.socket, socket.socket]  # of a connection: the server's, the client's
NEW_NETWORK = 0x40000000  # CLONE_NEWNET of linux/sched.h
BURST = 3028  # bytes that a limited link may send at once: two full frames
SHARED_BURST = 6056  # the same for the server's link
QUEUE = 400_000  # bytes that may wait before a client's link


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
def star(rates: list[float], server_mbps: float | None) -> Iterator[list[Ends]]:
    """Make the machines and the links; give a connection for each client."""
    prefix = f"clock{os.getpid()}"
    server, router = f"{prefix}s", f"{prefix}r"
    clients = [f"{prefix}c{client}" for client in range(len(rates))]
    with ExitStack() as undo:
        for space in (server, router, *clients):
            run("ip", "netns", "add", space)
            undo.callback(run, "ip", "netns", "delete", space)  # its cards go with it
        forward = "echo 1 > /proc/sys/net/ipv4/ip_forward"
        run("ip", "netns", "exec", router, "sh", "-c", forward)
        join(server, router, 0)
        for number, (space, mbps) in enumerate(zip(clients, rates, strict=True), 1):
            join(space, router, number)
            for place in (space, router):
                limit(place, number, mbps)
        if server_mbps is not None:
            share(server, "dst", len(rates), server_mbps)
            share(router, "src", len(rates), server_mbps)
        yield [connect(server, space, undo) for space in clients]


def join(space: str, router: str, number: int) -> None:
    """Make a link between a machine and the router, which sends each frame by itself."""
    card = f"link{number}"
    peer = ["type", "veth", "peer", "name", card, "netns", router]
    run("ip", "link", "add", card, "netns", space, *peer)
    for place, host in ((space, 1), (router, 2)):
        run("ip", "-n", place, "addr", "add", f"10.79.{number}.{host}/24", "dev", card)
        run("ip", "-n", place, "link", "set", card, "gso_max_segs", "1", "up")
    run("ip", "-n", space, "route", "add", "default", "via", f"10.79.{number}.2")


def limit(space: str, number: int, mbps: float) -> None:
    """Limit what a machine sends on a link."""
    how = ["tbf", "rate", f"{mbps}mbit", "burst", str(BURST), "limit", str(QUEUE)]
    run("tc", "-n", space, "qdisc", "add", "dev", f"link{number}", "root", *how)


def share(space: str, address: str, num_clients: int, mbps: float) -> None:
    """Limit what is sent on the server's link, in equal parts for the clients with something there.

    address: of a packet, dst or src, whichever is the client's.
    """
    card, burst = ["dev", "link0"], ["burst", str(SHARED_BURST), "cburst", str(SHARED_BURST)]

    def add(kind: str, *words: str) -> None:
        run("tc", "-n", space, kind, "add", *card, *words)

    add("qdisc", "root", "handle", "1:", "htb")
    add("class", "parent", "1:", "classid", "1:1", "htb", "rate", f"{mbps}mbit", *burst)
    for client in range(1, num_clients + 1):
        mine = ["htb", "rate", f"{mbps / num_clients}mbit", "ceil", f"{mbps}mbit", *burst]
        add("class", "parent", "1:1", "classid", f"1:{client + 1:x}", *mine, "quantum", "1514")
        match = ["u32", "match", "ip", address, f"10.79.{client}.1/32"]
        add("filter", "parent", "1:", "protocol", "ip", *match, "flowid", f"1:{client + 1:x}")


def connect(server: str, client: str, undo: ExitStack) -> Ends:
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


def measure(ends: list[Ends], num_bytes: int) -> np.ndarray:
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


def simulate(rates: list[float], server_mbps: float | None, num_bytes: int) -> np.ndarray:
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


def compare(rates: list[float], sizes: list[float], server_mbps: float | None) -> list[dict]:
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
    parser.add_argument("--server", type=float, help="Mbit/s of the server's link, if limited")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    given = parser.parse_args()
    if min(*given.rates, *given.sizes, 1 if given.server is None else given.server) <= 0:
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
