"""Who waited for whom in a round, and how busy links and devices were: all from the ledger's rows.

The ledger has no rows for computing and needs none. A client computes from the end of the last
message that it receives until the start of the first message that it sends.
"""

from collections.abc import Collection
from typing import Any

from federation.ledger import LedgerRow


def utilisation(
    rows: list[LedgerRow],
    counted: Collection[int],
    left_out: Collection[int],
    begin: float,
    end: float,
) -> dict[str, Any]:
    """Keys of a row of rounds.jsonl, for the round that lasted from begin to end (seconds).

    rows: the ledger's, of this round. counted: the clients whose updates were averaged.
    left_out: those that were late or failed. If they sent nothing, the rows do not say how long
    they computed, so device_utilisation is a mean over the other clients.
    """
    chains: dict[str, list[LedgerRow]] = {}
    for row in sorted(rows, key=lambda row: row.start):
        client = row.sender if row.direction == "up" else row.receiver
        if client.isdigit():  # or it is an edge server
            chains.setdefault(client, []).append(row)
    ends = {name: _end(chains[name][-1]) for name in map(str, counted) if name in chains}
    last = max(ends, key=ends.get, default=None)
    unknown = {name for name in map(str, left_out) if name in chains}
    unknown = {name for name in unknown if chains[name][-1].direction == "down"}
    links, devices = [], []
    for name, chain in chains.items():
        links.append(_share([(row.start, _end(row)) for row in chain], begin, end))
        if name not in unknown:
            devices.append(_share(_computing(chain, begin, end), begin, end))
    return {
        "waited_for": last,  # the client that ended last, as the ledger names it
        "waited_seconds": sum(ends[last] - done for done in ends.values()),
        "link_utilisation": _mean(links),
        "device_utilisation": _mean(devices),
    }


def _end(row: LedgerRow) -> float:
    return row.start + row.seconds


def _computing(chain: list[LedgerRow], begin: float, end: float) -> list[tuple[float, float]]:
    """When a client computes; it may have received in an earlier round, or send in a later one."""
    spans = [
        (_end(before), after.start)
        for before, after in zip(chain, chain[1:], strict=False)
        if (before.direction, after.direction) == ("down", "up")
    ]
    if chain[0].direction == "up":
        spans.append((begin, chain[0].start))
    if chain[-1].direction == "down":
        spans.append((_end(chain[-1]), end))
    return spans


def _share(spans: list[tuple[float, float]], begin: float, end: float) -> float:
    """The share of the round that these spans take; they do not overlap."""
    inside = (min(stop, end) - max(start, begin) for start, stop in spans)
    return sum(max(0.0, seconds) for seconds in inside) / (end - begin) if end > begin else 0.0


def _mean(shares: list[float]) -> float | None:
    return sum(shares) / len(shares) if shares else None
