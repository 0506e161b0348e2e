"""What a table says of a group of runs: accuracy, bytes, times, and how it compares.

Times are simulated: of clients' devices and links, not of the machine that trained. Bytes are those
of all clients together, in MB (10^6 bytes).
"""

from dataclasses import dataclass, replace

import numpy as np

from bandwidth_analysis.groups import Group, Spread
from bandwidth_analysis.runs import Run

WARM_UP = 1  # so many first rounds are left out of the times of a round
TARGET_OVER = 5  # evaluations whose mean must reach a target

ROUNDING = 1e-9  # of such a mean


@dataclass(frozen=True)
class Target:
    """When the runs of a group reached an accuracy; the spreads are empty unless all did."""

    accuracy: float  # from 0 to 1
    num_reached: int  # runs
    seconds: Spread
    mb_up: Spread
    mb_down: Spread


@dataclass(frozen=True)
class Comparison:
    """A group beside the baseline's; a factor is the baseline's value divided by the group's."""

    points: float  # of accuracy (mean of the last k), in percentage points
    fewer_bytes: float  # a factor, up and down together
    less_time: float  # a factor
    less_time_to_target: float  # a factor; NaN if one of the two groups did not reach it
    verdict: str  # what the seeds say about the difference in accuracy, or why there is none


@dataclass(frozen=True)
class Record:
    """A row of the table; each spread is over the group's runs, or over the rounds of all."""

    group: Group
    accuracy: Spread  # at the end, from 0 to 1
    mean_accuracy: Spread  # of the last k evaluations
    mb_up: Spread
    mb_down: Spread
    ratio_up: float  # bytes in float32 divided by the bytes that were sent
    ratio_down: float
    ratio: float  # of both directions together
    simulated_seconds: Spread
    computation: Spread  # seconds that a client computes in a round, a mean over its clients
    communication: Spread  # seconds in which its link carries a message
    step: Spread  # seconds of a whole round
    target: Target | None
    comparison: Comparison | None

    @property
    def final_accuracy(self) -> float:
        """The mean of the last k evaluations, from 0 to 1; NaN of runs that are not finished.

        An unfinished run has cost less than it will, so that it has no place on a Pareto front.
        """
        return self.mean_accuracy.mean if self.group.finished else float("nan")

    @property
    def mb(self) -> Spread:
        """Up and down together."""
        pairs = zip(self.mb_up.values, self.mb_down.values, strict=True)
        return Spread(tuple(up + down for up, down in pairs))

    @property
    def simulated_minutes(self) -> Spread:
        return self.simulated_seconds.times(1 / 60)


def make_records(
    groups: list[Group], target: float | None = None, baseline: Group | None = None
) -> list[Record]:
    """Return a record for each group.

    target: an accuracy from 0 to 1 to be reached, None for none; baseline: the group, one of
    `groups`, with which the others are compared; runs of another data set or unfinished ones are
    not, and their comparison says so.
    """
    base = baseline and _record(baseline, target)
    return [_record(group, target, base) for group in groups]


def _record(group: Group, target: float | None, base: Record | None = None) -> Record:
    runs = group.runs
    up, down, dense_up, dense_down = (
        Spread(tuple(run.total(kind) / 1e6 for run in runs))
        for kind in ("bytes_up", "bytes_down", "dense_bytes_up", "dense_bytes_down")
    )
    record = Record(
        group=group,
        accuracy=Spread(tuple(run.last_accuracy for run in runs)),
        mean_accuracy=Spread(tuple(run.mean_accuracy for run in runs)),
        mb_up=up,
        mb_down=down,
        ratio_up=_ratio(dense_up.mean, up.mean),
        ratio_down=_ratio(dense_down.mean, down.mean),
        ratio=_ratio(dense_up.mean + dense_down.mean, up.mean + down.mean),
        simulated_seconds=Spread(tuple(run.simulated_seconds for run in runs)),
        computation=over_rounds(runs, "device_utilisation"),
        communication=over_rounds(runs, "link_utilisation"),
        step=over_rounds(runs),
        target=None if target is None else _target(runs, target),
        comparison=None,
    )
    if base is None or base.group is group:
        return record
    return replace(record, comparison=_comparison(record, base))


def over_rounds(runs: list[Run], share: str = "") -> Spread:
    """The seconds of the rounds of all runs after the warm-up, or a share of each round."""
    seconds = [
        run.per_round("simulated_seconds") * (run.per_round(share) if share else 1) for run in runs
    ]
    after = [lasted[WARM_UP if len(lasted) > WARM_UP else 0 :] for lasted in seconds]
    known = [lasted[~np.isnan(lasted)] for lasted in after]
    return Spread(tuple(np.concatenate(known).tolist()))


def round_of_target(run: Run, target: float) -> int | None:
    """The index, from 0, of the round of the first evaluation at which the target is reached.

    What must reach it is the mean over the last TARGET_OVER evaluations, or over as many as there
    have been, since a single one is noisy.
    """
    evaluated = np.flatnonzero(~np.isnan(run.accuracy))
    for place in range(len(evaluated)):
        latest = evaluated[max(0, place + 1 - TARGET_OVER) : place + 1]
        if run.accuracy[latest].mean() >= target - ROUNDING:
            return int(evaluated[place])
    return None


def _target(runs: list[Run], accuracy: float) -> Target:
    reached = [round_of_target(run, accuracy) for run in runs]
    num_reached = sum(index is not None for index in reached)
    pairs = list(zip(runs, reached, strict=True)) if num_reached == len(runs) else []

    def until(key: str) -> Spread:
        return Spread(tuple(float(run.per_round(key)[: index + 1].sum()) for run, index in pairs))

    up, down = (
        Spread(tuple(value / 1e6 for value in until(key).values))
        for key in ("bytes_up", "bytes_down")
    )
    return Target(accuracy, num_reached, until("simulated_seconds"), up, down)


def _comparison(record: Record, base: Record) -> Comparison:
    unknown = float("nan")
    if record.group.first.dataset != base.group.first.dataset:
        return Comparison(unknown, unknown, unknown, unknown, "other data set: not compared")
    if not (record.group.finished and base.group.finished):
        return Comparison(unknown, unknown, unknown, unknown, "unfinished: not compared")
    return Comparison(
        points=100 * (record.mean_accuracy.mean - base.mean_accuracy.mean),
        fewer_bytes=_ratio(base.mb.mean, record.mb.mean),
        less_time=_ratio(base.simulated_seconds.mean, record.simulated_seconds.mean),
        less_time_to_target=_ratio(base.target.seconds.mean, record.target.seconds.mean)
        if record.target
        else unknown,
        verdict=_verdict(record, base),
    )


def _verdict(record: Record, base: Record) -> str:
    """What the seeds say, plainly: ranges that overlap may differ by chance."""
    fewest = min(record.group.num_seeds, base.group.num_seeds)
    if fewest == 1:
        return "one seed: may be chance"
    overlap = record.mean_accuracy.overlaps(base.mean_accuracy)
    return f"ranges {'overlap' if overlap else 'apart'} ({fewest} seeds)"


def _ratio(whole: float, part: float) -> float:
    return whole / part if part else float("nan")
