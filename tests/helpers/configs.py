"""The configs of the repository, and one from YAML text and overrides in ./x.yaml."""

from pathlib import Path

import pytest

from command_line import load_config
from config import PROJECT, Config, ConfigError

SWEEPS = sorted((PROJECT / "configs/sweeps").glob("*.yaml"))
CONFIGS = sorted({*(PROJECT / "configs").rglob("*.yaml")} - {*SWEEPS})

# Small pictures, few clients and steps; everything else is as a config says.
SMALL = ["data.name=digits", "data.root=", "data.fallback=", "rounds=2", "trackers=[]"]
SMALL += ["clients.total=4", "clients.per_round=2", "local.steps=1", "local.batch_size=4"]
SMALL += ["evaluation.every=2", "precision=fp32", "data.crop=null"]

# What some configs, or those of a folder, need besides to run, or to be as small as the others.
MORE = {
    "gossip": ["clients.per_round=4"],
    "semi_synchronous": ["schedule.period_seconds=null"],
    "experiments": ["model.width=0.125"],
}


def small(path: Path) -> list[str]:
    """The overrides with which the config at that path is small."""
    return [*SMALL, *MORE.get(path.stem, MORE.get(path.parent.name, []))]


def load(text: str = "", *overrides: str) -> Config:
    Path("x.yaml").write_text(text)
    return load_config(Path("x.yaml"), list(overrides))


def mistake(text: str = "", *overrides: str) -> str:
    """The message of the ConfigError that this ends in: one line."""
    with pytest.raises(ConfigError) as error:
        load(text, *overrides)
    message = str(error.value)
    assert message and "\n" not in message
    return message
