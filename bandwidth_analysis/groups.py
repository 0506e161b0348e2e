"""Runs that differ in nothing but their seed form a group, which is one row of a table."""

import json
from dataclasses import dataclass
from statistics import mean, stdev

from bandwidth_analysis.runs import Run, run_labels

NO_SETTINGS = ("seed", "output_dir")  # of a config: what may differ within a group


@dataclass(frozen=True)
class Spread:
    """Values of one thing, such as the accuracies of a group's runs."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values) if self.values else float("nan")

    @property
    def sd(self) -> float:
        """The standard deviation of a sample; NaN of a single value, which shows none."""
        return stdev(self.values) if len(self.values) > 1 else float("nan")

    @property
    def low(self) -> float:
        return min(self.values, default=float("nan"))

    @property
    def high(self) -> float:
        return max(self.values, default=float("nan"))

    def times(self, factor: float) -> "Spread":
        return Spread(tuple(factor * value for value in self.values))

    def overlaps(self, other: "Spread") -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True, eq=False)
class Group:
    """Runs with the same settings; all of them are finished, or none is."""

    label: str  # the name of the runs, or their folders if other groups have that name
    runs: list[Run]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def num_seeds(self) -> int:
        return len({run.seed for run in self.runs})

    @property
    def finished(self) -> bool:
        return self.first.finished


def group_runs(runs: list[Run]) -> list[Group]:
    """Return the groups in the order in which their first runs were given."""
    members: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        members.setdefault(_settings(run), []).append(place)
    names = [runs[places[0]].name for places in members.values()]
    labels = run_labels(runs)
    return [
        Group(
            name if names.count(name) == 1 else ", ".join(labels[place] for place in places),
            [runs[place] for place in places],
        )
        for name, places in zip(names, members.values(), strict=True)
    ]


def group_names(runs: list[Run]) -> list[str]:
    """Name each group for a legend: a single run as elsewhere, several by how many there are."""
    names = dict(zip(map(id, runs), run_labels(runs), strict=True))
    return [
        (names[id(g.first)] if len(g.runs) == 1 else f"{g.label} ({len(g.runs)} runs)")
        + " (unfinished)" * (not g.finished)
        for g in group_runs(runs)
    ]


def _settings(run: Run) -> str:
    """What the runs of a group have in common, as text."""
    settings = {key: value for key, value in run.config.items() if key not in NO_SETTINGS}
    return json.dumps([settings, run.dataset, run.finished], sort_keys=True, default=str)
