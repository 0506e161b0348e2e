"""What a user reads when the device's memory is full: which setting to lower."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from config import ConfigError


@contextmanager
def memory_governed_by(key: str) -> Iterator[None]:
    """Within this context, memory that runs out is a ConfigError that names the key to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = re.search(r"Tried to allocate ([^.]*\.?\d* ?\w+)", str(error))
        raise ConfigError(_answer(key, "GPU", asked and asked[1])) from None
    except RuntimeError as error:
        asked = re.search(r"can't allocate memory: you tried to allocate (\d+ bytes)", str(error))
        if not asked:
            raise
        raise ConfigError(_answer(key, "computer", asked[1])) from None


def _answer(key: str, whose: str, asked: str | None) -> str:
    more = f", which had no room for {asked} more" if asked else ""
    return f"{key}: too much for the {whose}'s memory{more}; lower it, or model.width"
