"""Asks the reader of the installed DeepSpeed whether it knows the keys of a config and takes them.

It ignores an unknown key in silence. So it is given a config that remembers which keys were asked
for: what nobody asked for is unknown.
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


def check_keys(config: dict[str, Any]) -> None:
    """Raises ValueError, a line that names the key, where DeepSpeed would ignore or refuse it.

    "auto" may stand anywhere. Imports DeepSpeed, which takes seconds.
    """
    defaults = vars(_read({}))
    for key, value in config.items():  # one at a time: whatever is raised is about this one
        section, error = Asked({key: {} if value == "auto" else value}), None
        try:
            _read(section)
        except Exception as raised:  # the reader uses values before it looks at their types
            error = raised
        if key not in (*section.asked, *ELSEWHERE):
            raise ValueError(f"{_unknown(key, section.asked)}; it would ignore it")
        if value == "auto":
            continue
        if error:
            raise ValueError(_reason(key, value, error))
        for problem in _never_asked(section[key], f"{key}."):
            raise ValueError(f"{problem}; it would ignore it")
        if isinstance(defaults.get(key), bool) and value not in (True, False):
            raise ValueError(f"{key} is {value!r}; it takes true or false")
    try:
        _read({key: value for key, value in config.items() if value != "auto"})
    except AssertionError as error:  # keys that contradict each other
        raise ValueError(str(error)) from None


def _read(config: dict[str, Any]) -> Any:
    from deepspeed.runtime.config import DeepSpeedConfig

    reader = DeepSpeedConfig.__new__(DeepSpeedConfig)  # its __init__ wants batch sizes and ranks
    reader._initialize_params(config)
    return reader


def _reason(key: str, value: Any, error: Exception) -> str:
    """What DeepSpeed's error says, as a line that begins with the dotted key."""
    from deepspeed.runtime.config import DeepSpeedConfigModel
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return f"{key}: DeepSpeed cannot read {value!r}: {' '.join(str(error).split())}"
    problem = error.errors()[0]
    path = [str(name) for name in problem["loc"]]
    dotted = ".".join(path if path[:1] == [key] else [key, *path])
    if problem["type"] != "extra_forbidden":
        return f"{dotted}: {problem['msg']}"
    known = {f for model in DeepSpeedConfigModel.__subclasses__() for f in model.model_fields}
    return f"{_unknown(dotted, known)}; remove it"


def _never_asked(section: Any, prefix: str) -> Iterator[str]:
    # a section of which nothing was asked went to pydantic whole: it refuses on its own
    if not isinstance(section, Asked) or not section.asked:
        return
    for key, value in section.items():
        if key not in section.asked:
            yield _unknown(f"{prefix}{key}", section.asked)
        elif key not in FREE:
            yield from _never_asked(value, f"{prefix}{key}.")


def _unknown(dotted: str, known: set[str]) -> str:
    nearest = difflib.get_close_matches(dotted.rpartition(".")[2], known, 1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return f"DeepSpeed has no key {dotted}{hint}"
