"""From the command line and a YAML file to a checked Config: defaults < YAML < command line.

A mistake ends as one line that names the file, the line and the nearest valid name. Two readers
look at a YAML file: OmegaConf for its values, and yaml's own tree for the lines they stand on.
"""

import argparse
import difflib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from config import Config, ConfigError, Selection


def read_command_line(default: str, arguments: list[str]) -> tuple[Config, bool]:
    """Return the config and whether this is a dry run; on a mistake print one line and exit 2."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--config FILE] [--dry_run] [key=value ...]",
        description="Any key of the config can be given as key=value, such as server.lr=0.01.",
    )
    parser.add_argument("--config", default=default, type=Path, help=f"default: {default}")
    parser.add_argument("--dry_run", action="store_true", help="say what would be done, and end")
    parser.add_argument("--local_rank", type=int, help="given by launchers; not needed")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args(arguments)
    try:
        return load_config(Path(given.config), given.overrides), given.dry_run
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")


def load_config(path: Path, overrides: list[str]) -> Config:
    """Read the defaults, then the YAML file, then `key=value` overrides.

    Raises ConfigError: unknown key, wrong type, value out of range, settings that contradict each
    other or deepspeed_config.json, unreadable file.
    """
    text, tree = _read_yaml(path)
    where = {key: f"{path}:{line}" for key, line in _lines(tree)}
    _check_keys(yaml.safe_load(text) or {}, Config, where, str(path))
    from_cli = _read_overrides(overrides)
    given = OmegaConf.to_container(from_cli)  # as it was written: ${...} not yet resolved
    where |= {key: "command line" for key in _dotted(given)}
    _check_keys(given, Config, {}, "command line")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text), from_cli)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{_place(key, where, path)}: {key}: {reason}") from None
    for key, message in _violations(config):
        raise ConfigError(f"{_place(key, where, path)}: {key}: {message}")
    check_deepspeed(config)
    return config


def _read_yaml(path: Path) -> tuple[str, yaml.Node | None]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text)
        OmegaConf.create(text)  # its loader also refuses a key that is given twice
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(
            f"{path}: cannot be read: {reason}; give a YAML file to --config"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}{line}: not valid YAML: {reason}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
    if tree is not None and not isinstance(tree, yaml.MappingNode):
        raise ConfigError(f"{path}:1: a config is a list of `key: value` lines")
    return text, tree


def _read_overrides(overrides: list[str]) -> Any:
    for item in overrides:
        if not re.match(r"[A-Za-z_][\w.]*=", item):
            raise ConfigError(f"command line: {item!r} is not of the form key=value")
    try:
        return OmegaConf.from_dotlist([o + '""' if o.endswith("=") else o for o in overrides])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"command line: {' '.join(overrides)}: {reason}") from None


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield every dotted key of a YAML tree with its line, counted from 1."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            yield dotted, key.start_mark.line + 1
            yield from _lines(value, f"{dotted}.")


def _dotted(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def _place(key: str, where: dict[str, str], default: object) -> str:
    """The file and line of a key, or of the nearest section above it that was written down."""
    key = re.sub(r"\[\d+\]", "", key)  # an item of a list stands where its list does
    while key and key not in where:
        key = key.rpartition(".")[0]
    return where.get(key, str(default))


def _check_keys(tree: Any, section: type, where: dict[str, str], default: str, prefix: str = ""):
    names = {f.name: f for f in fields(section)}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        place = _place(dotted, where, default)
        if key not in names:
            hint = _nearest(str(key), list(names))
            raise ConfigError(f"{place}: {dotted}: no such key; {hint}")
        kind = names[key].type
        if is_dataclass(kind):
            if not isinstance(value, dict):
                raise ConfigError(f"{place}: {dotted}: a section of keys, not {value!r}")
            _check_keys(value, kind, where, default, f"{dotted}.")
        elif get_origin(kind) is dict and not isinstance(value, dict):
            raise ConfigError(f"{place}: {dotted}: takes keys and values, {{a: 1}}, not {value!r}")
        elif get_origin(kind) is list and not isinstance(value, list):
            raise ConfigError(f"{place}: {dotted}: takes a list, [...], not {value!r}")


def _nearest(key: str, names: list[str]) -> str:
    """A hint by spelling, or by initials: learning_rate is called lr here."""
    initials = "".join(word[0] for word in key.split("_") if word)
    near = [initials] if initials in names else difflib.get_close_matches(key, names, n=1)
    return f"did you mean '{near[0]}'?" if near else f"it takes {', '.join(names)}"


def _violations(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, what is wrong) for values of the right type that cannot be used."""
    for f in fields(section):
        key, value = f"{prefix}{f.name}", getattr(section, f.name)
        if is_dataclass(value):
            yield from _violations(value, f"{key}.")
        elif "choices" in f.metadata and value not in f.metadata["choices"]:
            yield key, f"{value!r} is not one of {', '.join(f.metadata['choices'])}"
        elif "pattern" in f.metadata and not re.fullmatch(f.metadata["pattern"], value):
            yield key, f"{value!r} is none of the forms {f.metadata['examples']}"
        elif "range" in f.metadata and value is not None:
            low, high, open_low = f.metadata["range"]
            if not (low < value <= high if open_low else low <= value <= high) or value == math.inf:
                above = f"above {low}" if open_low else f"at least {low}"
                yield (
                    key,
                    f"{value} is out of range; {above}" + f", at most {high}" * (high < math.inf),
                )
    if isinstance(section, Config):
        yield from _contradictions(section)


def _contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """Settings that are fine alone and make no sense together."""
    clients, local, model = config.clients, config.local, config.model
    if clients.per_round > clients.total:
        yield "clients.per_round", f"{clients.per_round} is more than clients.total={clients.total}"
    if local.nesterov and local.momentum == 0:
        yield "local.nesterov", "needs local.momentum above 0"
    if not re.fullmatch(r"batch|group\([1-9]\d*\)", model.norm):
        yield "model.norm", f"{model.norm!r} is neither batch nor group(n), such as group(2)"
    if not re.fullmatch(r"[\w.-]+", config.name) or config.name.startswith("."):
        yield "name", f"{config.name!r} must be usable as a folder: letters, digits, - _ ."
    if local.lr_schedule.name == "step" and not local.lr_schedule.milestones:
        yield (
            "local.lr_schedule.milestones",
            "step needs the rounds at which lr drops, like [20, 30]",
        )
    for key in ("pruning.warmup", "pruning.client_densities", "downlink.pruning.warmup"):
        if not all(0 < density <= 1 for density in attrgetter(key)(config)):
            yield key, "every density must be above 0, at most 1"
    if len(config.pruning.client_densities) > clients.total:
        yield "pruning.client_densities", f"more densities than clients.total={clients.total}"
    yield from _compression_contradictions(config)
    if config.server.optimizer == "FedExP" and (
        config.pruning.method == "random" and not config.uplink.error_feedback
    ):
        yield "server.optimizer", "FedExP would take the noise of a random choice for progress"
    if model.norm_policy != "average" and not model.name.startswith("resnet"):
        yield "model.norm_policy", f"{model.name} has no norm layers"
    if model.norm_policy == "frozen" and model.norm != "batch":
        yield "model.norm_policy", f"{model.norm} has no statistics to freeze"
    normalises = model.name.startswith("resnet") and model.norm == "batch"
    if config.distributed.ranks_per_client > 1 and normalises and model.norm_policy != "frozen":
        yield (
            "distributed.ranks_per_client",
            "each rank's BatchNorm would see a part of the batch; use model.norm=group(2)",
        )
    if config.server.optimizer == "FedExP" and local.algorithm in ("FedNova", "FedDyn"):
        yield "server.optimizer", f"FedExP extrapolates averages; {local.algorithm} makes others"
    if config.server.scheduler_options and not config.server.scheduler:
        yield "server.scheduler_options", "given without server.scheduler"


def _compression_contradictions(config: Config) -> Iterator[tuple[str, str]]:
    uplink, downlink, local = config.uplink, config.downlink, config.local
    both = (
        ("uplink", uplink, "pruning", config.pruning),
        ("downlink", downlink, "downlink.pruning", downlink.pruning),
    )
    for name, link, section, selection in both:
        yield from _selection_contradictions(section, selection)
        if link.dense_below and selection.method == "random":
            yield f"{name}.dense_below", f"{section}.method random leaves no tensor whole"
        if link.values.startswith("powersgd") and selection.method != "none":
            yield f"{name}.values", f"{link.values} needs whole tensors: pruning method none"
        if link.values.startswith("powersgd") and config.pruning.mask.method != "none":
            yield f"{name}.values", f"{link.values} needs whole tensors: pruning.mask.method none"
    if downlink.mode == "model" and downlink.pruning.method != "none":
        yield "downlink.pruning.method", "a part of the model can be sent only in mode: change"
    if downlink.mode == "model" and re.match(r"sign|ternary|powersgd|int2|qsgd2", downlink.values):
        yield "downlink.values", f"{downlink.values} ruins a whole model: it needs mode: change"
    if uplink.momentum and config.pruning.method == "none":
        yield "uplink.momentum", "does nothing where all is sent: needs a pruning.method"
    if uplink.momentum and not uplink.error_feedback:
        yield "uplink.momentum", "corrects what error feedback keeps: needs error_feedback: true"
    if uplink.momentum and (local.steps != 1 or local.momentum):
        yield "uplink.momentum", "needs local.steps: 1 and local.momentum: 0 (momentum twice)"


def _selection_contradictions(section: str, selection: Selection) -> Iterator[tuple[str, str]]:
    if selection.method not in ("topk", "random"):
        for key in ("warmup", "client_densities"):
            if getattr(selection, key, None):
                yield f"{section}.{key}", f"method {selection.method} has no density"
    if selection.method == "threshold" and selection.relative and selection.threshold >= 1:
        yield f"{section}.threshold", "nothing is above the largest: relative needs one below 1"


def check_deepspeed(config: Config) -> None:
    """Refuse a deepspeed_config.json that repeats a setting with another value.

    What DeepSpeed's file repeats must say "auto" or agree: one home for each value.
    """
    path = Path(config.deepspeed_config)
    if not path.exists():
        return
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError(f'{path}: a DeepSpeed config is an object of keys, like {{"key": value}}')
    ours = {  # DeepSpeed's key: (our key, our value)
        "train_micro_batch_size_per_gpu": ("local.batch_size", config.local.batch_size),
        "gradient_accumulation_steps": ("one step a batch", 1),
        "gradient_clipping": ("local.clip", config.local.clip),
        "optimizer.type": ("local.optimizer", config.local.optimizer),
        "optimizer.params.lr": ("local.lr", config.local.lr),
        "optimizer.params.momentum": ("local.momentum", config.local.momentum),
        "optimizer.params.weight_decay": ("local.weight_decay", config.local.weight_decay),
        "optimizer.params.nesterov": ("local.nesterov", config.local.nesterov),
    }
    if config.precision != "auto":
        for kind in ("fp16", "bf16"):
            ours[f"{kind}.enabled"] = ("precision", config.precision == kind)
    for theirs, (key, value) in ours.items():
        found = _walk(given, theirs)
        if found is not None and found != "auto" and found != value:
            raise ConfigError(
                f'{path}: {theirs} is {found!r} but {key} is {value!r}; write "auto" there'
            )


def _walk(tree: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree
