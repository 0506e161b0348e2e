"""deepspeed_config.json, checked against our settings and by DeepSpeed's own reader.

What the file repeats of our settings must say the same or "auto": one home for each value.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import Config, ConfigError, from_here
from training.deepspeed_keys import check_keys

SECTIONS = ("fp16", "bf16", "optimizer", "optimizer.params", "zero_optimization", "comms_logger")
USED = {  # the keys that do something here, of sections whose subject the YAML settles
    "fp16": ("enabled", "initial_scale_power"),
    "bf16": ("enabled",),
    "optimizer": ("type", "params"),
}
ELSEWHERE = {  # whole sections whose subject the YAML settles, and where
    "scheduler": "local.lr_schedule",
    "torch_autocast": "precision",
    "amp": "precision",
}
WORDS = ("true", "false", "yes", "no", "on", "off", "null")


def read_config(config: Config) -> dict[str, Any]:
    """What the file says without "auto". Imports DeepSpeed, which takes seconds.

    Raises ConfigError as read_deepspeed_file() does, and for a key that DeepSpeed does not know or
    a value that it refuses.
    """
    given = read_deepspeed_file(config)
    try:
        check_keys(given)
    except ValueError as error:
        raise ConfigError(f"{from_here(config.deepspeed_config)}: {error}") from None
    return _without_auto(given)


def read_deepspeed_file(config: Config) -> dict[str, Any]:
    """What the file named by deepspeed_config says, or {} if none is. Does not import DeepSpeed.

    Raises ConfigError: the file is missing or not JSON, or what it says differs from the YAML, does
    nothing here, or would be done behind the YAML's back.
    """
    if not config.deepspeed_config:
        return {}
    path = from_here(config.deepspeed_config)
    given = _read_json(path)
    if not isinstance(given, dict):
        raise ConfigError(f'{path}: a DeepSpeed config is an object of keys, like {{"key": value}}')
    for problem in _problems(_without_auto(given), config):
        raise ConfigError(f"{path}: {problem}")
    return given


def _read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text, object_pairs_hook=_unique)
    except OSError as error:
        remedy = "correct the path, or write deepspeed_config= for none"
        raise ConfigError(f"deepspeed_config: {path}: {error.strerror}; {remedy}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, given pair by pair. Raises ValueError for a key that stands twice."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{key} stands twice in one object; keep one of them")
    return dict(pairs)


def _problems(given: dict[str, Any], config: Config) -> Iterator[str]:
    """What is wrong with the file here, each as a line that begins with the key."""
    for section in SECTIONS:
        found = _find(given, section, {})
        if not isinstance(found, dict):
            yield f'{section} is {_show(found)}; it takes an object of keys, {{"key": value}}'
    for key, value in _leaves(given):
        if isinstance(value, str) and _should_have_no_quotes(value):
            yield f"{key} is the text {_show(value)}; write it without quotes"
    for key, home in ELSEWHERE.items():
        if key in given:
            yield f"{key}: set {home} in the YAML instead"
    for section, known in USED.items():
        for key in given.get(section, {}):
            if key not in known:
                yield f"{section}.{key} does nothing here; remove it"
    yield from _differences(given, config)
    if "train_batch_size" in given:
        yield 'train_batch_size follows from local.batch_size; write "auto"'
    zero = given.get("zero_optimization", {})
    stage, steps = zero.get("stage", 0), given.get("steps_per_print", 1)
    if not (type(stage) is int and 0 <= stage <= 2):
        yield f"zero_optimization.stage is {_show(stage)}; there are 0, 1 and 2 here"
    for key in zero:
        if "offload" in key:
            yield f"zero_optimization.{key}: nothing leaves the device of training; remove it"
    if not (type(steps) is int and steps > 0):
        yield f"steps_per_print is {_show(steps)}; it takes a whole number above 0"


def _differences(given: dict[str, Any], config: Config) -> Iterator[str]:
    local = config.local
    ours = {  # DeepSpeed's key: (our key, our value)
        "train_micro_batch_size_per_gpu": ("local.batch_size", local.batch_size),
        "gradient_accumulation_steps": ("one step a batch", 1),
        "gradient_clipping": ("local.clip", local.clip),
        "optimizer.type": ("local.optimizer", local.optimizer),
        "optimizer.params.lr": ("local.lr", local.lr),
        "optimizer.params.momentum": ("local.momentum", local.momentum),
        "optimizer.params.weight_decay": ("local.weight_decay", local.weight_decay),
        "optimizer.params.nesterov": ("local.nesterov", local.nesterov),
    }
    if config.precision != "auto":
        for kind in ("fp16", "bf16"):
            ours[f"{kind}.enabled"] = ("precision", config.precision == kind)
    for theirs, (key, value) in ours.items():
        found = _find(given, theirs, value)
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            yield f'{theirs} is {_show(found)} but {key} is {_show(value)}; write "auto" there'


def _find(tree: Any, dotted: str, default: Any) -> Any:
    for key in dotted.split("."):
        if not isinstance(tree, dict) or key not in tree:
            return default
        tree = tree[key]
    return tree


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all dotted keys whose values have no keys."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _should_have_no_quotes(text: str) -> bool:
    """Whether a text reads as a number or as a word of JSON, which DeepSpeed may take it for."""
    try:
        float(text)
        return True
    except ValueError:
        return text.lower() in WORDS


def _without_auto(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {key: _without_auto(value) for key, value in tree.items() if value != "auto"}


def _show(value: Any) -> str:
    return json.dumps(value)
