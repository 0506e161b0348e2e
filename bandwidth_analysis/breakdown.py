"""What a round's time and a client's bytes consist of, by the columns of rounds.jsonl.

Each function takes the runs of a group and returns means, by name, over those runs that have the
column, which older runs lack; {} if none has it.
"""

from collections.abc import Callable

from bandwidth_analysis.records import WARM_UP
from bandwidth_analysis.runs import Run

REST = "rest of the round"
Parts = dict[str, float]


def phase_seconds(runs: list[Run]) -> Parts:
    """The wall's seconds that the main rank spends on each phase of a round after the warm-up.

    REST is what the phases leave of the round. Where threads work at once that may be nothing.
    """
    each = []
    for run in runs:
        after = run.rows[WARM_UP if run.num_rounds > WARM_UP else 0 :]
        rows = [row for row in after if row["phase_seconds"]]
        whole = _mean([{REST: row["wall_seconds"]} for row in rows])
        each.append(_mean([row["phase_seconds"] for row in rows]) | whole)
    seconds = _mean(each)
    whole = seconds.pop(REST, 0.0)
    return seconds and seconds | {REST: max(0.0, whole - sum(seconds.values()))}


def megabytes_by_part(runs: list[Run]) -> Parts:
    """The megabytes that went up in a run, by part of the updates and by the other kinds.

    All updates together are split as those are that the rounds describe.
    """
    each = []
    for run in runs:
        parts = _mean([row["bytes_by_part"] for row in run.rows])
        if not parts:
            continue
        kinds = {kind: num for (way, kind), num in run.bytes_by_kind.items() if way == "up"}
        share = kinds.pop("update", 0) / sum(parts.values())
        each.append({part: share * num for part, num in parts.items()} | kinds)
    return {name: num / 1e6 for name, num in _mean(each).items()}


def bytes_by_layer(runs: list[Run], at_most: int) -> Parts:
    """The bytes of each layer in a client's update, in the network's order.

    A layer's weight and bias are one. If there are over `at_most` layers, those of a block are one,
    and so on: names lose their ends until there are few enough.
    """
    tensors = _mean([_mean([row["bytes_by_tensor"] for row in run.rows]) for run in runs])
    layers = _merged(tensors, lambda name: name.rpartition(".")[0] or name)
    depth = max((name.count(".") for name in layers), default=0)
    while len(layers) > at_most and depth:
        layers = _merged(layers, lambda name, depth=depth: ".".join(name.split(".")[:depth]))
        depth -= 1
    return layers


def _mean(each: list[Parts]) -> Parts:
    """The mean of each number over those that know any; what they lack counts as 0."""
    known = [parts for parts in each if parts]
    names = dict.fromkeys(name for parts in known for name in parts)
    return {name: sum(parts.get(name, 0) for parts in known) / len(known) for name in names}


def _merged(parts: Parts, name_of: Callable[[str], str]) -> Parts:
    """The sums of those that have the same new name."""
    merged: Parts = {}
    for name, number in parts.items():
        merged[name_of(name)] = merged.get(name_of(name), 0) + number
    return merged
