"""Which keys of a DeepSpeed config the installed DeepSpeed knows.

It ignores an unknown key in silence. So its own reader is given a config that remembers which keys
were asked for: what nobody asked for is unknown.
"""

import difflib
from collections.abc import Iterator
from typing import Any

ELSEWHERE = ("sequence_parallel_size", "data_parallel_size", "vocabulary_size")  # not by the reader
FREE = ("params",)  # arguments of an optimizer or a scheduler


class Asked(dict):
    """A dict that remembers the keys that were asked for, there or not."""

    def __init__(self, items: dict):
        super().__init__((k, Asked(v) if isinstance(v, dict) else v) for k, v in items.items())
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: str) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:  # overridden, it makes **self call __getitem__
        return super().__iter__()


def unknown_keys(config: dict[str, Any]) -> list[str]:
    """Dotted names of the keys that DeepSpeed does not know, with the nearest that it does.

    "auto" may stand anywhere. Imports DeepSpeed, which takes seconds.
    Raises ValueError where DeepSpeed refuses a value.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigModel
    from pydantic import ValidationError

    fields = {f for model in DeepSpeedConfigModel.__subclasses__() for f in model.model_fields}
    found, config = [], Asked(config)
    while True:
        reader = DeepSpeedConfig.__new__(DeepSpeedConfig)  # its __init__ wants batch sizes, ranks
        try:
            reader._initialize_params(config)
            return found + list(_never_asked(config, ""))
        except ValidationError as error:  # some sections do refuse unknown keys: one at a time
            problem = error.errors()[0]
            if problem["type"] != "extra_forbidden":
                where = ".".join(map(str, problem["loc"]))
                raise ValueError(f"{error.title}: {where}: {problem['msg']}") from None
            name = problem["loc"][-1]
            found += [place + _nearest(name, fields) for place in _take_out(config, name, "")]


def _take_out(section: Asked, key: str, prefix: str) -> Iterator[str]:
    """Delete `key` from the sections, and say where it was."""
    if prefix and section.pop(key, None) is not None:
        yield f"{prefix}{key}"
    for name, value in section.items():
        if isinstance(value, Asked):
            yield from _take_out(value, key, f"{prefix}{name}.")


def _never_asked(section: Asked, prefix: str) -> Iterator[str]:
    for key, value in section.items():
        if key not in section.asked and not (key in ELSEWHERE and not prefix):
            yield f"{prefix}{key}{_nearest(key, section.asked)}"
        # a section of which nothing was asked went to pydantic whole: it refuses on its own
        elif isinstance(value, Asked) and value.asked and key not in FREE:
            yield from _never_asked(value, f"{prefix}{key}.")


def _nearest(key: str, known: set[str]) -> str:
    nearest = difflib.get_close_matches(key, known, 1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
