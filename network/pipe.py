"""Flows that share the server's bandwidth in one direction, max-min fair.

None can have more unless one that has no more than it gets less (Bertsekas and Gallager 1992,
section 6.5.2). No flow is faster than its client can do.
"""

import math
from typing import Any

import numpy as np

from network.trace import STEP_MS, Trace

# A full Ethernet frame has 1514 bytes. The headers of Ethernet, IP and TCP, with its time stamps,
# take 66 of them, so that this share of a link's bandwidth carries payload.
PAYLOAD_SHARE = 1448 / 1514


class Pipe:
    """The flows of one direction, and how they share the server's bandwidth."""

    ARRAYS = ("clients", "left", "fastest", "first_steps")  # with an entry for each flow

    def __init__(self, mbps: float | None, trace: Trace | None):
        self.capacity = math.inf if mbps is None else payload_rate(mbps)  # bytes per second
        self.trace = trace
        self.now = 0.0  # up to when `left` is told
        self.clients = np.zeros(0, np.int64)
        self.left = np.zeros(0)  # bytes that have not arrived
        self.fastest = np.zeros(0)  # bytes per second that each client can do
        self.first_steps = np.zeros(0, np.int64)  # of the trace, at time 0
        self.rates = np.zeros(0)
        self._next: tuple[float, int | None] | None = None  # None: to be found anew

    def add(self, client: int, time: float, num_bytes: int, fastest: float, first_step: int):
        self._move(time)
        self.clients = np.append(self.clients, client)
        self.left = np.append(self.left, float(num_bytes))
        self.fastest = np.append(self.fastest, fastest)
        self.first_steps = np.append(self.first_steps, first_step)

    def remove(self, client: int, time: float) -> float:
        """Take a flow out; return how many bytes had not arrived."""
        self._move(time)
        return self._delete(int(np.flatnonzero(self.clients == client)[0]))

    def state(self) -> dict[str, Any]:
        """The flows under way as numbers and lists; load() goes on from it, to the bit."""
        return {"now": self.now} | {name: getattr(self, name).tolist() for name in self.ARRAYS}

    def load(self, state: dict[str, Any]) -> None:
        self.now, self._next = state["now"], None
        for name in self.ARRAYS:
            setattr(self, name, np.array(state[name], getattr(self, name).dtype))

    def next_event(self) -> float:
        """When a flow ends or a trace's rates change, if no flow comes or goes before."""
        if self._next is None:
            self._next = self._find_next()
        return self._next[0]

    def pass_event(self) -> int | None:
        """Let that event happen; return the client whose flow has ended, if one has."""
        self.next_event()
        time, place = self._next
        self._move(time)
        if place is None:
            return None
        client = int(self.clients[place])
        self._delete(place)
        return client

    def _find_next(self) -> tuple[float, int | None]:
        if not len(self.clients):
            return math.inf, None
        fastest, changes = self.fastest, math.inf
        if self.trace:
            step = math.floor(1e3 * self.now / STEP_MS + 1e-6)
            carried = payload_rate(self.trace.mbps(self.first_steps + step))
            fastest, changes = np.minimum(fastest, carried), (step + 1) * STEP_MS / 1e3
        self.rates = max_min_fair(fastest, self.capacity)
        lasting = np.where(self.left > 0, math.inf, 0.0)
        np.divide(self.left, self.rates, out=lasting, where=self.rates > 0)
        place = int(np.argmin(lasting))
        end = self.now + float(lasting[place])
        return (end, place) if end <= changes else (changes, None)

    def _move(self, time: float) -> None:
        """Let the flows go on until then, at the rates that they have."""
        if time > self.now:
            self.next_event()
            if len(self.clients):
                self.left = np.maximum(0.0, self.left - self.rates * (time - self.now))
            self.now = time
        self._next = None

    def _delete(self, place: int) -> float:
        left = float(self.left[place])
        for name in self.ARRAYS:
            setattr(self, name, np.delete(getattr(self, name), place))
        return left


def payload_rate(mbps: float | np.ndarray) -> float | np.ndarray:
    """Bytes of payload per second of a link of so many 10^6 bits per second."""
    return PAYLOAD_SHARE * mbps * 1e6 / 8


def max_min_fair(fastest: np.ndarray, capacity: float) -> np.ndarray:
    """Rates (flows) that share the capacity: each its own fastest, or the level that is left.

    With the flows sorted by what they can do, the level at flow k is what the slower ones leave,
    divided among k and all that are faster; the first flow that can do more than its level sets it.
    """
    if fastest.sum() <= capacity:
        return fastest
    ordered = np.sort(fastest)
    taken = np.concatenate([[0.0], np.cumsum(ordered[:-1])])
    levels = (capacity - taken) / np.arange(len(ordered), 0, -1)
    return np.minimum(fastest, levels[np.argmax(levels <= ordered)])
