"""uplink.budget: so many times fewer bytes up than dense, sent in the best known way.

Clients that are asked a few times in a run cannot pay back what error feedback owes them, so the
update has to be right on average: EDEN, of all coordinates or of a random part. Among its bit
widths and densities of equal bytes, the one of least variance is taken.
"""

import re
from dataclasses import replace

from config import Config, Pruning

WHOLE_BITS = (1, 2, 3, 4)


def ratio_of(budget: str) -> float:
    """The number before the x of 100x. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)x", budget)
    if not found or float(found[1]) < 1:
        raise ValueError(f"{budget!r} is not how many times fewer bytes than dense, such as 100x")
    return float(found[1])


def with_budget(config: Config, bits: float = 1, density: float = 1.0) -> Config:
    """The config with what a budget settles; itself without a budget. Raises ValueError.

    bits: of each value that travels; below one, all of them do. The bits and density of a run
    depend on the size of its network, see fit_to_budget().
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
    values, pruning = f"eden({bits:.4g})", Pruning(method="none")
    if bits in WHOLE_BITS:
        values = f"eden{bits}"
        pruning = Pruning(method="random", density=density, scope="layer")
    up = replace(config.uplink, values=values, error_feedback=False, momentum=0.0, dense_below=0)
    return replace(config, uplink=up, pruning=pruning)
