"""A config from YAML text and overrides, in the working directory's x.yaml."""

from pathlib import Path

import pytest

from command_line import load_config
from config import Config, ConfigError


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
