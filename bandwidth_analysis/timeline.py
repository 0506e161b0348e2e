"""Read from the ledger what each client did in a round, and when.

The ledger has a row for each message and none for computing. It needs none: a client computes from
the end of the last message that it receives until the start of the first message that it sends.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bandwidth_analysis.errors import REPAIR, AnalysisError, printable

FIELDS = ("round", "direction", "sender", "receiver", "start", "seconds")
NUM_DIGITS = 6  # of a second: clients that are done at the same time are in order of number
SHORTEST = 1e-9  # of a round: a shorter stage is the rounding of two times that are equal


class Segment(NamedTuple):
    """A stage of a client's round; times are seconds since the round began."""

    state: str  # download, compute, upload, idle, or unknown
    start: float
    end: float
    is_lost: bool = False  # nobody had any use for it, because the client was late or failed


@dataclass(frozen=True)
class Timeline:
    """A round: each client's segments, from its beginning to its end; first who was done first."""

    round_number: int
    seconds: float  # how long the round lasted
    clients: dict[str, list[Segment]]


def read_timeline(
    path: Path, round_number: int, begin: float, seconds: float, left_out: Collection[str]
) -> Timeline:
    """Read a round from the ledger at `path`.

    begin: when the round began on the run's simulated clock, in seconds. left_out: the clients that
    were late or failed. Raises AnalysisError if the ledger is damaged.
    """
    chains: dict[str, list[Segment]] = {}
    for client, segment in _read_messages(path, round_number, begin):
        chains.setdefault(client, []).append(segment)
    clients = {
        client: _whole_round(sorted(chain, key=lambda s: s.start), seconds, client in left_out)
        for client, chain in chains.items()
    }
    done = {client: round(_done_at(clients[client]), NUM_DIGITS) for client in clients}
    order = sorted(clients, key=lambda client: (done[client], len(client), client))
    return Timeline(round_number, seconds, {client: clients[client] for client in order})


def _done_at(segments: list[Segment]) -> float:
    """When a client was done, in seconds since the round began."""
    return max((segment.end for segment in segments if segment.state != "idle"), default=0.0)


def _read_messages(path: Path, round_number: int, begin: float) -> list[tuple[str, Segment]]:
    """The round's messages by client, as segments; a last line that a kill cut off is left out."""
    wanted = {str(round_number), "0"} if round_number == 1 else {str(round_number)}
    messages = []
    try:
        with path.open(encoding="utf-8") as file:
            heading = file.readline().strip().split(",")
            places = [heading.index(field) for field in FIELDS]
            for line in file:
                cells = line.strip().split(",")
                if not line.endswith("\n") or cells[places[0]] not in wanted:
                    continue
                _, direction, sender, receiver, *times = (cells[place] for place in places)
                start, seconds = map(float, times)
                if not (math.isfinite(start) and 0 <= seconds < math.inf):
                    raise ValueError("a time is no number")
                state, client = ("upload", sender) if direction == "up" else ("download", receiver)
                segment = Segment(state, start - begin, start - begin + seconds)
                if not client.startswith("edge"):  # an edge server's time is no client's
                    messages.append((printable(client), segment))
    except OSError as error:
        raise AnalysisError(f"{path}: cannot be read ({error.strerror}); {REPAIR}") from None
    except (ValueError, IndexError) as error:
        raise AnalysisError(f"{path}: damaged ({error}); {REPAIR}") from None
    return messages


def _whole_round(messages: list[Segment], seconds: float, is_left_out: bool) -> list[Segment]:
    """All the segments of a client in a round of so many seconds, from its messages in order."""
    began = "compute" if messages[0].state == "upload" else "idle"  # received in an earlier round
    before = Segment(began, 0.0, 0.0)
    segments = []
    for after in [*messages, Segment("end", seconds, seconds)]:
        state = before.state
        if before.state == "download":
            state = "compute" if after.state != "download" else "idle"
        elif before.state == "upload":
            state = "idle"
        segments += [Segment(state, before.end, after.start), after]
        before = after
    inside = [Segment(s.state, max(0.0, s.start), min(seconds, s.end)) for s in segments[:-1]]
    whole = [s for s in inside if s.end - s.start > SHORTEST * seconds]
    busy = [place for place, segment in enumerate(whole) if segment.state != "idle"]
    if is_left_out and busy:
        lost = whole[busy[-1]]
        # It received, and nothing followed: it may have computed until the end or left before.
        state = "unknown" if lost.state == "compute" else lost.state
        whole[busy[-1]] = lost._replace(state=state, is_lost=True)
    return whole
