"""Two machines in one: network namespaces whose host names stand for loopback addresses."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from helpers.runs import REPOSITORY

ADDRESSES = ("10.77.0.1", "10.77.0.2")
# The name of the machine itself stands for 127.0.1.1 in /etc/hosts, as on Debian and Ubuntu.
START = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def two_machines(folder: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Give start(machine, *command, **environment), where machine is 0 or 1.

    The machines are node0 and node1; they share the disk and nothing else. Skips the test where
    there is no `ip` or no right to make namespaces.
    """
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("network namespaces need root and `ip` (iproute2)")
    spaces, cards = ([f"fl{os.getpid()}{kind}{i}" for i in (0, 1)] for kind in "nc")
    with ExitStack() as undo:
        try:
            for space in spaces:
                ip("netns", "add", space)
                undo.callback(ip, "netns", "delete", space)  # its cards go with it
                ip("-n", space, "link", "set", "lo", "up")
            pair = ["type", "veth", "peer", "name", cards[1], "netns", spaces[1]]
            ip("link", "add", cards[0], "netns", spaces[0], *pair)
            for space, card, address in zip(spaces, cards, ADDRESSES, strict=True):
                ip("-n", space, "addr", "add", f"{address}/24", "dev", card)
                ip("-n", space, "link", "set", card, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for own in (0, 1):
            names = (
                f"127.0.0.1 localhost\n127.0.1.1 node{own}\n{ADDRESSES[1 - own]} node{1 - own}\n"
            )
            (folder / f"hosts{own}").write_text(names)

        def start(machine: int, *command: str, **environment: str) -> subprocess.Popen:
            inside = ["ip", "netns", "exec", spaces[machine], "unshare", "--mount", "--uts"]
            inside += ["sh", "-c", START, "sh", f"{folder}/hosts{machine}", f"node{machine}"]
            process = subprocess.Popen(
                [*inside, *command],
                cwd=REPOSITORY,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            undo.callback(process.kill)
            return process

        yield start
