"""uplink.budget, downlink.budget: so many times fewer bytes than dense, sent in the best known way.

Up: clients that are asked a few times in a run cannot pay back what error feedback owes them, so
the update has to be right on average: EDEN, of all coordinates or of a random part. Among its bit
widths and densities of equal bytes, those of least error are taken. A client of more weight in the
average sends more.

Down: the server sends what each client's own copy lacks, where it lacks much; allowance.py says how
much.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from config import Config, Downlink, Pruning, Selection

WHOLE_BITS = (1, 2, 3, 4)
FEW_VALUES = 32  # times fewer bytes, from where on two magnitudes for each tensor are exact enough


def ratio_of(budget: str) -> float:
    """The number before the x of 100x. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)x", budget)
    if not found or float(found[1]) < 1:
        raise ValueError(f"{budget!r} is not how many times fewer bytes than dense, such as 100x")
    return float(found[1])


def with_budget(config: Config, bits: float = 1, of_clients: Sequence[float] = (1.0,)) -> Config:
    """The config with what a budget settles; itself without a budget. Raises ValueError.

    bits: of each value that travels; below one, all of them do. of_clients: each client's bits in
    that case, and else its density. What a run has depends on the size of its network and on its
    clients, see fit_to_budget().
    """
    if not config.uplink.budget:
        return config
    ratio_of(config.uplink.budget)  # for its error
    for key, is_used in {
        "pruning.fit_deadline": config.pruning.fit_deadline,
        "pruning.mask.method": config.pruning.mask.method != "none",
        "submodel.widths": config.submodel.widths,
        "schedule.name=gossip": config.schedule.name == "gossip",
    }.items():
        if is_used:
            raise ValueError(f"does not go with {key}: give one of the two")
    up = replace(config.uplink, error_feedback=False, momentum=0.0, dense_below=0)
    shares = list(of_clients)
    if bits in WHOLE_BITS:
        mean = sum(shares) / len(shares)
        pruning = Pruning(method="random", density=mean, client_densities=shares, scope="layer")
        return replace(config, uplink=replace(up, values=f"eden{bits}"), pruning=pruning)
    up = replace(up, values=f"eden({bits:.4g})", client_bits=shares)
    return replace(config, uplink=up, pruning=Pruning(method="none"))


def with_downlink_budget(config: Config) -> Config:
    """The same for the downlink. Raises ValueError."""
    budget = config.downlink.budget
    if not budget:
        return config
    ratio = ratio_of(budget)
    if config.submodel.widths:
        raise ValueError("does not go with submodel.widths: give one of the two")
    values = "means2" if ratio >= FEW_VALUES else "int8"
    above_a_limit = Selection(method="threshold")
    down = Downlink(budget=budget, mode="copies", values=values, pruning=above_a_limit)
    return replace(config, downlink=down)
