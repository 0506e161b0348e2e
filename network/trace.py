"""A packet-delivery trace: what a link was measured to carry, packet by packet.

The file has a line for each packet of 1500 bytes that the link could have delivered: the moment, in
whole milliseconds from the start. It is mahimahi's format (Netravali et al. 2015). The trace starts
again when it ends, so that its period is its last moment.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PACKET_BYTES = 1500
STEP_MS = 100  # over so many milliseconds the clock takes a link with a trace to be steady


@dataclass(frozen=True, eq=False)
class Trace:
    stamps: np.ndarray  # int64 milliseconds that never go back; the last one is above 0

    def bytes_until(self, seconds: float) -> int:
        """How much the link can have carried by then."""
        return PACKET_BYTES * int(self._packets(np.floor(1e3 * seconds + 1e-6)))

    def seconds_until(self, num_bytes: int) -> float:
        """When the packet arrives that completes so many bytes."""
        if num_bytes <= 0:
            return 0.0
        cycles, place = divmod(math.ceil(num_bytes / PACKET_BYTES) - 1, len(self.stamps))
        return float(cycles * self.stamps[-1] + self.stamps[place]) / 1e3

    def mbps(self, steps: np.ndarray) -> np.ndarray:
        """The mean bandwidth within each of these steps, which last STEP_MS and count from 0."""
        first = np.asarray(steps) * STEP_MS
        packets = self._packets(first + STEP_MS) - self._packets(first)
        return 8 * PACKET_BYTES * packets / (1e3 * STEP_MS)

    @property
    def num_steps(self) -> int:
        """How many steps the trace lasts before it starts again, rounded up."""
        return -(-int(self.stamps[-1]) // STEP_MS)

    def _packets(self, milliseconds: np.ndarray) -> np.ndarray:
        """How many packets have arrived by then."""
        cycles, rest = np.divmod(milliseconds, self.stamps[-1])
        return cycles * len(self.stamps) + np.searchsorted(self.stamps, rest, side="right")


def read_trace(path: Path) -> Trace:
    """Read a trace. Raises ValueError: file and line, and what is wrong there; OSError."""
    stamps = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if not re.fullmatch("[0-9]{1,15}", text):
                raise ValueError(f"{path}:{number}: {text[:40]!r} is not a number of milliseconds")
            if stamps and int(text) < stamps[-1]:
                raise ValueError(f"{path}:{number}: {text} ms goes back, behind {stamps[-1]} ms")
            stamps.append(int(text))
    if not stamps or stamps[-1] == 0:
        reason = "the trace ends at 0 ms" if stamps else "the file is empty"
        raise ValueError(f"{path}:{max(1, len(stamps))}: {reason}; it needs a packet after 0 ms")
    return Trace(np.array(stamps, np.int64))
