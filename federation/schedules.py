"""The schedules by name: a new one is a subclass of Federation in a file of its own, and a line."""

from typing import Any

from config import Config
from distributed import Ranks
from federation.buffered import FedAsync, FedBuff
from federation.carried import CarriedOver
from federation.federation import Federation
from federation.gossip import Gossip
from federation.hierarchical import Hierarchical
from federation.semi_synchronous import SemiSynchronous
from federation.synchronous import Synchronous

SCHEDULES: dict[str, type[Federation]] = {
    "synchronous": Synchronous,
    "semi_synchronous": SemiSynchronous,
    "fedbuff": FedBuff,
    "fedasync": FedAsync,
    "hierarchical": Hierarchical,
    "gossip": Gossip,
}


def make_schedule(config: Config, ranks: Ranks, *rest: Any) -> Federation:
    """The schedule that the config names, with all that it holds. Raises ConfigError, DataError.

    rest: see Federation.
    """
    settings = config.schedule
    schedule = CarriedOver if settings.late == "carry" else SCHEDULES[settings.name]
    return schedule(config, ranks, *rest)
