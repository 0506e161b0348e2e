"""The clients of a rank that train networks of several widths: Clients for each width.

Seen from a schedule they are Clients. A client of a narrow network lives in its coordinates: the
model that it receives, its update, what it owes and what it sends.
"""

from collections.abc import Callable, Iterator
from typing import Any

from compression import Memory, new_memory
from config import Config
from federation.client import Clients
from federation.messages import Buffer, Report
from federation.slices import ShareOf, SliceBroadcast
from federation.uplink import LocalUpdate
from training.choices import Choices


class SubmodelClients:
    """by_share: the clients of each share of the channels, the widest first; they share a store."""

    own_positions = None  # no client has norm layers of its own

    def __init__(self, by_share: dict[float, Clients], share_of: ShareOf):
        self.by_share, self.share_of = by_share, share_of
        self.whole = whole = by_share[1.0]
        self.store, self.mask, self.one_by_one = whole.store, whole.mask, whole.one_by_one
        self.load, self.load_mask = whole.load, whole.load_mask
        self.uplink = Uplinks(self.of)

    def of(self, client: int) -> Clients:
        """The clients of this client's width."""
        return self.by_share[self.share_of(client)]

    def receive(self, broadcast: SliceBroadcast, round_number: int) -> None:
        """There is no mask to take over."""

    def train(
        self, clients: list[int], round_number: int, broadcast: SliceBroadcast
    ) -> Iterator[LocalUpdate]:
        """Train these clients: in their order or, with several lanes, width by width."""
        groups = [[client] for client in clients]
        if self.num_lanes > 1:
            groups = [[c for c in clients if self.share_of(c) == share] for share in self.by_share]
        for group in filter(None, groups):
            yield from self.of(group[0]).train(group, round_number, broadcast)

    @property
    def config(self) -> Config:
        """The settings by which clients train, whatever their width."""
        return self.whole.config

    @config.setter
    def config(self, config: Config) -> None:
        self._set("config", config)

    @property
    def num_lanes(self) -> int:
        """How many clients train at once."""
        return self.whole.num_lanes

    @property
    def choices(self) -> Choices:
        """How clients are trained, whatever their width."""
        return self.whole.choices

    @choices.setter
    def choices(self, choices: Choices) -> None:
        self._set("choices", choices)

    @property
    def stop_requested(self) -> bool:
        """Whether the user asked the run to stop."""
        return self.whole.stop_requested

    @stop_requested.setter
    def stop_requested(self, value: bool) -> None:
        self._set("stop_requested", value)

    def _set(self, name: str, value: Any) -> None:
        for clients in self.by_share.values():
            setattr(clients, name, value)


class Uplinks:
    """What schedules ask of an Uplink, passed on to that of the client's width."""

    def __init__(self, clients_of: Callable[[int], Clients]):
        self.clients_of = clients_of

    def encode(
        self, trained: LocalUpdate, round_number: int, memory: Memory = new_memory
    ) -> Report:
        """See Uplink.encode()."""
        return self.clients_of(trained.report.client).uplink.encode(trained, round_number, memory)

    def owe_refused(self, report: Report, round_number: int) -> None:
        """See Uplink.owe_refused()."""
        self.clients_of(report.client).uplink.owe_refused(report, round_number)

    def owe_lost(self, client: int, sent: Buffer, sent_in: int, round_number: int) -> None:
        """See Uplink.owe_lost()."""
        self.clients_of(client).uplink.owe_lost(client, sent, sent_in, round_number)
