"""The Pareto front: what nothing else beats in both cost and gain."""

import math


def on_front(costs: list[float], gains: list[float]) -> list[int]:
    """Return the places of those points for which no other costs less and gains at least as much.

    Of points that are equal in both, all are returned. A point with a NaN is on no front.
    """
    known = [
        place
        for place, point in enumerate(zip(costs, gains, strict=True))
        if not any(map(math.isnan, point))
    ]
    return [
        place
        for place in known
        if not any(
            costs[other] <= costs[place]
            and gains[other] >= gains[place]
            and (costs[other], gains[other]) != (costs[place], gains[place])
            for other in known
        )
    ]
