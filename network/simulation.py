"""The event clock: what many clients' downloads, training and uploads take, all at once.

A client works through a chain of stages. A message first takes the link's latency; then it is a
flow, and the flows that are under way in a direction share the server's bandwidth max-min fair. No
flow is faster than its client's own link. Time jumps from event to event, and between two events
every rate is constant.
"""

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from network.draws import normal, uniform
from network.pipe import Pipe, payload_rate
from network.population import Population
from network.trace import Trace

# Mathis, Semke, Mahdavi and Ott (1997): with a share p of packets lost and a round trip of RTT
# seconds, TCP sends C / sqrt(p) packets in RTT at most; C = sqrt(3/2) if each is acknowledged.
MATHIS = math.sqrt(3 / 2)


class Stage(NamedTuple):
    """A part of a client's chain."""

    kind: str  # down (to the client), compute, or up (to the server)
    num_bytes: int = 0  # of a message's payload
    # How long computing takes. Of a message: it is coded meanwhile, for so long, and each part is
    # sent as soon as it is coded, so that the flow is never faster than the coding.
    seconds: float = 0.0


class Span(NamedTuple):
    """A stage that is over; times are seconds of simulated time."""

    client: int
    stage: int  # its place in the chain, from 0
    kind: str
    start: float  # of a message: of its latency
    end: float
    num_bytes: int  # of the payload that had arrived by the end


class End(NamedTuple):
    """A client's chain is over, either completed or stopped."""

    time: float
    client: int
    is_complete: bool


@dataclass(eq=False)
class _Chain:
    stages: list[Stage]
    place: int = -1  # of the stage under way; -1: the chain has not begun
    begun: float = 0.0  # when that stage began
    timer: int = -1  # number of the timer that it waits for; a message waits for its latency
    stop_timer: int = -1

    def state(self) -> dict[str, Any]:
        return vars(self) | {"stages": [list(stage) for stage in self.stages]}


class Simulation:
    """egress_mbps, ingress_mbps: bandwidth out of the server and into it; None: unlimited."""

    def __init__(
        self,
        population: Population,
        egress_mbps: float | None = None,
        ingress_mbps: float | None = None,
        seed: int = 0,
    ):
        self.population, self.seed = population, seed
        self.now = 0.0  # simulated seconds
        self.spans: list[Span] = []  # in the order in which they ended; may be emptied
        self._chains: dict[int, _Chain] = {}
        self._timers: list[tuple[float, bool, int, int]] = []  # heap: time, stops, number, client
        self._num_timers = 0
        self._num_messages: Counter[int] = Counter()  # by client: each has a jitter of its own
        self._pipes = {
            "down": Pipe(egress_mbps, population.downlink_trace),
            "up": Pipe(ingress_mbps, population.uplink_trace),
        }

    @property
    def under_way(self) -> list[int]:
        """The clients whose chains have been started and are not over, in the order of starting."""
        return list(self._chains)

    def start(
        self,
        client: int,
        stages: Sequence[Stage],
        at: float | None = None,
        stop_at: float = math.inf,
    ) -> None:
        """Start a client's chain at a time from now on, and stop it at another if it still runs.

        Raises ValueError: the client has a chain already, or the times go back.
        """
        client, at = int(client), self.now if at is None else float(at)
        if client in self._chains:
            raise ValueError(f"client {client} is under way; stop its chain before the next one")
        if not self.now <= at <= stop_at:
            raise ValueError(f"times go back: now {self.now} s, start {at} s, stop {stop_at} s")
        plain = [Stage(kind, int(size), float(seconds)) for kind, size, seconds in stages]
        chain = self._chains[client] = _Chain(plain, begun=at)
        chain.timer = self._set_timer(at, client)
        if stop_at < math.inf:
            chain.stop_timer = self._set_timer(stop_at, client, stops=True)

    def advance(self, until: float = math.inf) -> End | None:
        """Let time pass until a chain is over.

        None: nothing is under way any more, or no chain is over at `until`, where time then stands.
        """
        while self._chains:
            pipe = min(self._pipes.values(), key=Pipe.next_event)
            timer = self._next_timer()
            time = min(pipe.next_event(), timer)
            if time > until:
                break
            self.now = time
            if pipe.next_event() <= timer:
                client = pipe.pass_event()
                end = None if client is None else self._end_stage(client)
            else:
                _, stops, _, client = heapq.heappop(self._timers)
                end = self.stop(client) if stops else self._after_waiting(client)
            if end:
                return end
        if until < math.inf:
            self.now = max(self.now, until)
        return None

    def stop(self, client: int) -> End:
        """End a chain now: its span says how many bytes of the message under way have arrived."""
        chain = self._chains[client]
        if chain.place >= 0:
            stage, arrived = chain.stages[chain.place], 0
            if chain.timer < 0:  # a flow
                left = self._pipes[stage.kind].remove(client, self.now)
                arrived = stage.num_bytes - math.ceil(left)
            self._add_span(client, chain, arrived)
        del self._chains[client]
        return End(self.now, client, is_complete=False)

    def seconds_alone(self, clients: np.ndarray | int, stages: Sequence[Stage]) -> np.ndarray:
        """How long each client's chain would take if it were alone, without jitter or traces."""
        seconds = np.zeros(np.shape(clients))
        for stage in stages:
            if stage.kind == "compute":
                seconds = seconds + stage.seconds
            else:
                fastest = self._fastest(clients, stage, traced=False)
                rate = np.minimum(fastest, self._pipes[stage.kind].capacity)
                latency = self.population.latency_ms[clients] / 1e3
                seconds = seconds + (latency + stage.num_bytes / rate)
        return seconds

    def state(self) -> dict[str, Any]:
        """All that is under way, as plain numbers, lists and dicts; the spans stay outside.

        load() of a simulation of the same clients goes on from it, to the bit.
        """
        return {
            "now": self.now,
            "chains": {client: chain.state() for client, chain in self._chains.items()},
            "timers": list(self._timers),
            "num_timers": self._num_timers,
            "num_messages": dict(self._num_messages),
            "pipes": {kind: pipe.state() for kind, pipe in self._pipes.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what state() returned, also where it went through JSON."""
        self.now, self._num_timers = state["now"], state["num_timers"]
        self._timers = [tuple(timer) for timer in state["timers"]]
        self._num_messages = Counter({int(c): n for c, n in state["num_messages"].items()})
        self._chains = {}
        for client, saved in state["chains"].items():
            stages = [Stage(*stage) for stage in saved["stages"]]
            self._chains[int(client)] = _Chain(**(saved | {"stages": stages}))
        for kind, saved in state["pipes"].items():
            self._pipes[kind].load(saved)

    # --- a chain, stage by stage ------------------------------------------------------------------

    def _after_waiting(self, client: int) -> End | None:
        """The timer of a chain has run down: of its start, of computing or of a latency."""
        chain = self._chains[client]
        chain.timer = -1
        if chain.place < 0:
            return self._begin_stage(client)
        stage = chain.stages[chain.place]
        if stage.kind == "compute":
            return self._end_stage(client)
        pipe = self._pipes[stage.kind]
        pipe.add(
            client,
            self.now,
            stage.num_bytes,
            float(self._fastest(client, stage, traced=pipe.trace is not None)),
            self._first_step(client, pipe.trace),
        )
        return None

    def _begin_stage(self, client: int) -> End | None:
        chain = self._chains[client]
        chain.place, chain.begun = chain.place + 1, self.now
        if chain.place == len(chain.stages):
            del self._chains[client]
            return End(self.now, client, is_complete=True)
        stage = chain.stages[chain.place]
        waits = stage.seconds if stage.kind == "compute" else self._latency(client)
        chain.timer = self._set_timer(self.now + waits, client)
        return None

    def _end_stage(self, client: int) -> End | None:
        chain = self._chains[client]
        self._add_span(client, chain, chain.stages[chain.place].num_bytes)
        return self._begin_stage(client)

    def _add_span(self, client: int, chain: _Chain, num_bytes: int) -> None:
        kind = chain.stages[chain.place].kind
        span = Span(client, chain.place, kind, chain.begun, self.now, num_bytes)
        self.spans.append(span)

    # --- a client's link --------------------------------------------------------------------------

    def _latency(self, client: int) -> float:
        """The seconds before this message flows: never below 0, each message with its own draw."""
        latency, jitter = self.population.latency_ms[client], self.population.jitter_ms[client]
        if jitter:
            message = self._num_messages[client]
            self._num_messages[client] += 1
            latency += jitter * float(normal(self.seed, "jitter", client, message))
        return max(0.0, float(latency)) / 1e3

    def _fastest(self, clients: np.ndarray | int, stage: Stage, traced: bool) -> np.ndarray:
        """Bytes of payload per second that each one's link, its losses and its coding allow."""
        people = self.population
        mbps = (people.uplink_mbps if stage.kind == "up" else people.downlink_mbps)[clients]
        rate = math.inf if traced else payload_rate(mbps)
        round_trip = 2 * people.latency_ms[clients] / 1e3
        with np.errstate(divide="ignore"):  # where nothing is lost, TCP sets no limit: inf
            limit = 1448 * MATHIS / (round_trip * np.sqrt(people.loss[clients]))
        rate = np.minimum(rate, limit)
        if stage.seconds and stage.num_bytes:
            rate = np.minimum(rate, stage.num_bytes / stage.seconds)
        return rate

    def _first_step(self, client: int, trace: Trace | None) -> int:
        """Where in a trace the client is at time 0: clients are spread over all of it."""
        if trace is None:
            return 0
        return int(uniform(self.population.seed, "trace", client) * trace.num_steps)

    # --- timers -----------------------------------------------------------------------------------

    def _set_timer(self, time: float, client: int, stops: bool = False) -> int:
        self._num_timers += 1
        heapq.heappush(self._timers, (float(time), stops, self._num_timers, client))
        return self._num_timers

    def _next_timer(self) -> float:
        """When the first timer runs down that somebody still waits for."""
        while self._timers:
            time, stops, number, client = self._timers[0]
            chain = self._chains.get(client)
            if chain and number == (chain.stop_timer if stops else chain.timer):
                return time
            heapq.heappop(self._timers)
        return math.inf
