"""Read a sweep: which runs it has, each with the command that a user would type for it.

    base: configs/default.yaml            # the config that all runs start from
    seeds: [1, 2, 3]                      # each run once a seed; else the base's seed
    output_dir: outputFolder/densities    # a run folder each, below this one
    jobs: 2                               # runs at a time, 1 by default
    all: {rounds: 75}                     # what every run changes, unless it says otherwise
    grid:                                 # every combination of these values
      pruning.density: [0.1, 0.01]
      server.optimizer: [FedAvg, FedYogi]

In place of `grid`, `list` has the overrides of each run, `{name: dense, pruning.method: none}`.
With `slurm` (slurm_partition, gpus_per_node, timeout_min and so on, as submitit names them) the
runs are jobs of a SLURM cluster.

This file and sweep.py alone in the folder import other code of the project: what reads its command
lines, so that a sweep is refused in the words in which its runs would be, and before any starts.
"""

import itertools
import json
import shlex
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from command_line import load_config
from config import PROJECT, Config, ConfigError, from_here
from startup.typed_yaml import compose

KEYS = ("base", "seeds", "output_dir", "jobs", "all", "grid", "list", "slurm")
OF_THE_SWEEP = {"seed": "seeds", "output_dir": "output_dir"}  # what its runs do not set themselves

Override = tuple[str, str, str]  # key, value, and the place in the file


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep."""

    words: list[str]  # after `python`: main.py, --config, ...
    config: Config  # as the run will have it

    @property
    def folder(self) -> Path:
        return self.config.run_folder

    @property
    def command(self) -> str:
        return shlex.join(["python", *self.words])

    @property
    def is_finished(self) -> bool:
        """Whether its folder holds this very run, done, so that there is no need to start it.

        In any doubt it is started: main.py then says what is wrong, or that the run is finished.
        """
        try:
            config = (self.folder / "config.yaml").read_text(encoding="utf-8")
            summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
            return config == self.config.to_yaml() and summary["empty_rounds"] == 0
        except (OSError, ValueError, KeyError, TypeError):
            return False


@dataclass(frozen=True)
class Sweep:
    runs: list[PlannedRun]
    output_dir: Path
    jobs: int  # at a time
    slurm: dict[str, Any] | None  # submitit's parameters; None: processes of this machine


def read_sweep(path: Path) -> Sweep:
    """Read a sweep's file and check every run as main.py would.

    Raises ConfigError, one line with the place: the file, a key or a value is wrong, the base is
    missing, or two runs would have the same folder.
    """
    file = _SweepFile(path)
    base, output_dir = file.text("base"), file.text("output_dir")
    if not (PROJECT / base).is_file():
        raise ConfigError(f"{file.place('base')}: base: {base}: no such file; name a config")
    runs: dict[Path, PlannedRun] = {}  # by folder
    for seed, overrides in itertools.product(file.seeds(), file.variants()):
        words = [f"{key}={value}" for key, value, _ in overrides]
        words += [f"output_dir={output_dir}"] + [f"seed={seed}" for _ in range(seed is not None)]
        run = PlannedRun(["main.py", "--config", base, *words], _load(file, base, words, overrides))
        if (before := runs.setdefault(run.folder, run)) is not run:
            raise ConfigError(
                f"{overrides[0][2] if overrides else path}: two runs would have the folder "
                f"{run.folder}: {before.command} and {run.command}; remove one or give each a name"
            )
    return Sweep(list(runs.values()), from_here(output_dir), file.jobs(), file.slurm())


def _load(file: "_SweepFile", base: str, words: list[str], overrides: list[Override]) -> Config:
    """The config of a run; a mistake in an override is at its place in the sweep's file."""
    try:
        return load_config(from_here(base), words)
    except ConfigError as error:
        where, _, message = str(error).partition("command line: ")
        if where:
            raise
        places = {key: place for key, _, place in overrides}
        named = next((key for key in places if message.startswith(key)), None)
        raise ConfigError(f"{places.get(named, file.path)}: {message}") from None


class _SweepFile:
    """The tree of a sweep's file. Every value is text, as on the command line."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.source = path.read_text(encoding="utf-8")
            root = compose(self.source)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}; name a sweep") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: cannot be read: not UTF-8 text; save it so") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            reason = getattr(error, "problem", None) or str(error).splitlines()[0]
            line = f":{mark.line + 1}" if mark else ""
            raise ConfigError(f"{path}{line}: not valid YAML: {reason}") from None
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: a sweep is a list of `key: value` lines")
        self.nodes: dict[str, yaml.Node] = {}
        for key, value in root.value:
            if key.value not in KEYS:
                near = get_close_matches(key.value, KEYS, 1)
                hint = f"did you mean '{near[0]}'?" if near else f"a sweep takes {', '.join(KEYS)}"
                raise ConfigError(f"{self._at(key)}: {key.value}: no such key; {hint}")
            self.nodes[key.value] = value

    def place(self, key: str) -> str:
        return self._at(self.nodes[key])

    def text(self, key: str) -> str:
        """The value of a key that must be there."""
        node = self.nodes.get(key)
        if node is None:
            raise ConfigError(f"{self.path}: {key}: missing; write `{key}: ...`")
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            raise ConfigError(f"{self._at(node)}: {key}: takes text")
        return node.value

    def jobs(self) -> int:
        if "jobs" not in self.nodes:
            return 1
        number = self.text("jobs")
        if not number.isdecimal() or int(number) == 0:
            raise ConfigError(f"{self.place('jobs')}: jobs: takes a whole number from 1")
        return int(number)

    def seeds(self) -> list[str | None]:
        """The seeds as text; [None] where the base's is meant."""
        if "seeds" not in self.nodes:
            return [None]
        seeds = [seed.value for seed in self._items("seeds", self.nodes["seeds"])]
        if not seeds or not all(isinstance(seed, str) and seed.isdecimal() for seed in seeds):
            raise ConfigError(f"{self.place('seeds')}: seeds: takes whole numbers, [1, 2, 3]")
        return seeds

    def variants(self) -> list[list[Override]]:
        """The overrides of each run, but for the seed."""
        if ("grid" in self.nodes) == ("list" in self.nodes):
            raise ConfigError(f"{self.path}: give either grid or list, which say what differs")
        common = self._overrides(self.nodes["all"]) if "all" in self.nodes else []
        return [
            [other for other in common if other[0] not in [key for key, _, _ in own]] + own
            for own in self._differences()
        ]

    def _differences(self) -> list[list[Override]]:
        """What each run changes besides what all of them do."""
        if "list" in self.nodes:
            return [self._overrides(item) for item in self._items("list", self.nodes["list"])]
        axes = []
        for key, values in self._pairs(self.nodes["grid"]):
            items = self._items(f"grid: {key.value}", values)
            axes.append([(key.value, self._as_word(item), self._at(item)) for item in items])
        return [list(combination) for combination in itertools.product(*axes)]

    def slurm(self) -> dict[str, Any] | None:
        if "slurm" not in self.nodes:
            return None
        node = self.nodes["slurm"]
        self._pairs(node)
        text = self.source[node.start_mark.index : node.end_mark.index]
        return yaml.safe_load(" " * node.start_mark.column + text)

    def _overrides(self, node: yaml.Node) -> list[Override]:
        return [
            (key.value, self._as_word(value), self._at(key)) for key, value in self._pairs(node)
        ]

    def _pairs(self, node: yaml.Node) -> list[tuple[yaml.Node, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{self._at(node)}: takes keys and values, not {node.value!r}")
        for key, _ in node.value:
            if key.value in OF_THE_SWEEP:
                right = OF_THE_SWEEP[key.value]
                raise ConfigError(f"{self._at(key)}: {key.value}: is the sweep's; use its {right}")
        return node.value

    def _items(self, key: str, node: yaml.Node) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise ConfigError(f"{self._at(node)}: {key}: takes a list of values, [...]")
        return node.value

    def _as_word(self, node: yaml.Node) -> str:
        """The value as it would stand after `key=` on the command line."""
        if isinstance(node, yaml.ScalarNode):
            return node.value
        if not node.flow_style:
            raise ConfigError(f"{self._at(node)}: write the value in one line, [...] or {{...}}")
        return " ".join(self.source[node.start_mark.index : node.end_mark.index].split())

    def _at(self, node: yaml.Node) -> str:
        return f"{self.path}:{node.start_mark.line + 1}"
