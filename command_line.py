"""From the command line and a YAML file to a checked Config: defaults < YAML < command line.

A mistake ends as one line that names the file, the line and the nearest valid name.
"""

import argparse
import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from config import (
    NEUTRAL,
    Config,
    ConfigError,
    Network,
    Selection,
    from_here,
)
from federation.budget import with_budget, with_downlink_budget
from federation.schedule_settings import schedule_contradictions
from network.profiles import DEVICES, LINKS, wrong_shares
from startup.typed_yaml import Settings
from training.deepspeed_file import read_deepspeed_file

LONGEST_NAME = 120  # characters of a name that we make
UNFIT = re.compile(r"[^\w.,-]")  # for the name of a folder, unquoted in a shell


def read_command_line(default: str, arguments: list[str]) -> tuple[Config, bool]:
    """Return the config and whether this is a dry run; on a mistake print one line and exit 2.

    `default` is the YAML file, in the project folder, that is read without --config.
    """
    parser = Parser(
        usage="%(prog)s [--config FILE] [--dry_run] [key=value ...]",
        description="Any key of the config can be given as key=value, such as server.lr=0.01.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help=f"default: {default}")
    parser.add_argument("--dry_run", action="store_true", help="say what would be done, and end")
    parser.add_argument("--local_rank", "--local-rank", help="given by launchers; not needed")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given, unknown = parser.parse_known_intermixed_args(arguments)
    try:
        for word in unknown:
            raise ConfigError(f"command line: there is no option {word}; {_right_option(word)}")
        is_ours = given.config is None
        path = from_here(default) if is_ours else Path(os.path.expanduser(given.config))
        return load_config(path, given.overrides), given.dry_run
    except ConfigError as error:
        parser.exit(2, f"error: {one_line(str(error))}\n")
    except FileNotFoundError:  # of Path.cwd()
        parser.exit(2, "error: the working directory is gone; change to one that is there\n")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: command line: {one_line(message)}; see --help\n")


def _right_option(word: str) -> str:
    name, _, value = word.lstrip("-").partition("=")
    near = difflib.get_close_matches(f"--{name}", ("--config", "--dry_run"), 1)
    return f"did you mean {near[0]}?" if near else f"a key stands without dashes: {name}={value}"


def one_line(text: str) -> str:
    """The text with everything escaped that is not printable, such as line ends and odd bytes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def load_config(path: Path, overrides: list[str]) -> Config:
    """Read the defaults, then the YAML file, then `key=value` overrides.

    The name of the config takes what the overrides changed, unless it is among them itself.
    Raises ConfigError: unknown key, wrong type, value out of range, settings that contradict each
    other or deepspeed_config.json, unreadable file.
    """
    settings = Settings(path)
    before = settings.config()
    for word in overrides:
        settings.override(word)
    config = settings.config()
    if not any(word.startswith("name=") for word in overrides):
        config = replace(config, name=name_with_changes(before, config))
    for key, settle in {"uplink": with_budget, "downlink": with_downlink_budget}.items():
        try:
            config = settle(config)
        except ValueError as error:
            key += ".budget"
            raise ConfigError(f"{settings.place(key)}: {key}: {error}") from None
    for key, message in _violations(config):
        raise ConfigError(f"{settings.place(key)}: {key}: {message}")
    from federation.compatibility import contradictions  # torch takes seconds: all else is checked

    for key, message in contradictions(config):
        raise ConfigError(f"{settings.place(key)}: {key}: {message}")
    read_deepspeed_file(config)  # for its errors; a DeepSpeed engine reads it again
    _read_network_files(config, settings)
    return config


def name_with_changes(before: Config, after: Config) -> str:
    """The name of a run: the config's, and what the command line changed, sorted by key.

    It reads like default+server.optimizer=FedYogi. Characters that file systems or shells do not
    like and the folders of a path are left out, and so are the sections of keys if the name is
    long. A name that leaves something out ends in a hash over the whole, so that other settings
    have another name.
    """
    old, new = dict(_texts(before)), dict(_texts(after))
    changed = {key: new.get(key, "") for key in sorted(old | new) if old.get(key) != new.get(key)}
    whole = before.name + "".join(f"+{key}={text}" for key, text in changed.items())
    words = [(UNFIT.sub("", k), UNFIT.sub("", t.rpartition("/")[2])) for k, t in changed.items()]
    name = before.name + "".join(f"+{key}={text}" for key, text in words)
    if not changed or (name == whole and len(name) <= LONGEST_NAME):
        return name
    if len(name) > LONGEST_NAME:
        name = before.name + "".join(f"+{key.rpartition('.')[2]}={text}" for key, text in words)
    digest = hashlib.blake2b(whole.encode(), digest_size=5).hexdigest()
    return f"{name[: LONGEST_NAME - len(digest) - 1]}-{digest}"


def _texts(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted keys that make another run, with their values as text."""
    for f in fields(section):
        key, value = f"{prefix}{f.name}", getattr(section, f.name)
        if key in (*NEUTRAL, "name", "seed"):
            continue
        if is_dataclass(value):
            yield from _texts(value, f"{key}.")
        elif isinstance(value, dict):
            yield from ((f"{key}.{option}", json.dumps(value[option])) for option in value)
        elif isinstance(value, list):
            yield key, ",".join(map(str, value))
        else:
            yield key, value if isinstance(value, str) else json.dumps(value)


def _violations(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, what is wrong) for values of the right type that cannot be used."""
    for f in fields(section):
        key, value = f"{prefix}{f.name}", getattr(section, f.name)
        if is_dataclass(value):
            yield from _violations(value, f"{key}.")
        elif "choices" in f.metadata and value not in f.metadata["choices"]:
            yield key, f"{value!r} is not one of {', '.join(f.metadata['choices'])}"
        elif "range" in f.metadata:
            for number in value if isinstance(value, list) else [value]:
                if number not in (None, "auto") and not _is_within(number, *f.metadata["range"]):
                    yield key, f"{number} is out of range; {_describe(*f.metadata['range'])}"
    if isinstance(section, Config):
        yield from _contradictions(section)


def _is_within(number: float, low: float, high: float, open_low: bool) -> bool:
    """Whether a number is in the range; inf and nan are in none."""
    return (low < number if open_low else low <= number) and number <= high and number < math.inf


def _describe(low: float, high: float, open_low: bool) -> str:
    above = f"above {low}" if open_low else f"at least {low}"
    return above + f", at most {high}" * (high < math.inf)


def _contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """Settings that are fine alone and make no sense together."""
    clients, local, model = config.clients, config.local, config.model
    if clients.per_round > clients.total:
        yield "clients.per_round", f"{clients.per_round} is more than clients.total={clients.total}"
    if local.nesterov and local.momentum == 0:
        yield "local.nesterov", "needs local.momentum above 0"
    if not re.fullmatch(r"auto|[1-9]\d*", local.lanes):
        yield "local.lanes", f"{local.lanes!r} is neither auto nor a whole number from 1"
    elif local.lanes not in ("auto", "1"):
        yield from _lane_contradictions(config)
    if not re.fullmatch(r"batch|group\([1-9]\d*\)", model.norm):
        yield "model.norm", f"{model.norm!r} is neither batch nor group(n), such as group(2)"
    if not re.fullmatch(r"[\w.,+=-]+", config.name) or config.name[0] in ".-":
        yield "name", f"{config.name!r} must be usable as a folder: letters, digits, - _ . , + ="
    if len(os.fsencode(f"{config.name}-s{config.seed}")) > 255:
        yield "name", "with the seed it is longer than the 255 bytes that a folder's may have"
    if not config.output_dir:
        yield "output_dir", "names no folder"
    if local.lr_schedule.name == "step" and not local.lr_schedule.milestones:
        yield (
            "local.lr_schedule.milestones",
            "step needs the rounds at which lr drops, like [20, 30]",
        )
    yield from _capability_contradictions(config)
    yield from _momentum_contradictions(config)
    yield from _selection_contradictions("pruning", config.pruning)
    yield from _selection_contradictions("downlink.pruning", config.downlink.pruning)
    if model.norm_policy in ("frozen", "local") and not model.name.startswith("resnet"):
        yield "model.norm_policy", f"{model.name} has no norm layers"
    if model.norm_policy == "frozen" and model.norm != "batch":
        yield "model.norm_policy", f"{model.norm} has no statistics: use average"
    tracks = model.has_batch_norm and model.norm_policy != "frozen"
    if config.distributed.ranks_per_client > 1 and tracks:
        yield (
            "distributed.ranks_per_client",
            "each rank's BatchNorm would see a part of the batch; use model.norm=group(2)",
        )
    if config.server.scheduler_options and not config.server.scheduler:
        yield "server.scheduler_options", "given without server.scheduler"
    yield from _network_contradictions(config.network)
    yield from schedule_contradictions(config)


def _capability_contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """How much each client trains and sends."""
    local, pruning, total = config.local, config.pruning, config.clients.total
    if len(pruning.client_densities) > total:
        yield "pruning.client_densities", f"more densities than clients.total={total}"
    if len(local.client_steps) > total:
        yield "local.client_steps", f"more numbers than clients.total={total}"
    for section in ("local", "pruning"):
        if getattr(config, section).fit_deadline and config.schedule.deadline_seconds is None:
            yield f"{section}.fit_deadline", "fits to schedule.deadline_seconds, and none is set"
    if local.fit_deadline and (pruning.client_densities or pruning.warmup):
        yield "local.fit_deadline", "needs one density: give neither client_densities nor warmup"
    if local.fit_deadline and local.client_steps:
        yield "local.client_steps", "local.fit_deadline chooses them; give one of the two"
    if pruning.fit_deadline and pruning.method not in ("topk", "random"):
        yield "pruning.fit_deadline", f"method {pruning.method} has no density"


def _lane_contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """What trains one client at a time."""
    remedy = "trains one client at a time; use local.lanes: 1"
    if config.precision == "fp16":
        yield "local.lanes", f"precision: fp16 {remedy}"
    if config.distributed.engine == "deepspeed":
        yield "local.lanes", f"distributed.engine: deepspeed {remedy}"
    if config.distributed.ranks_per_client > 1:
        yield "local.lanes", f"distributed.ranks_per_client above 1 {remedy}"


def _momentum_contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """DGC's momentum correction, which is for one step a round."""
    uplink, local = config.uplink, config.local
    if not uplink.momentum:
        return
    if config.pruning.method == "none":
        yield "uplink.momentum", "does nothing where all is sent: needs a pruning.method"
    if not uplink.error_feedback:
        yield "uplink.momentum", "corrects what error feedback keeps: needs error_feedback: true"
    if local.optimizer != "SGD":
        yield "uplink.momentum", f"is of SGD's gradients: {local.optimizer} sends others"
    elif local.steps != 1 or local.momentum or local.client_steps:
        yield "uplink.momentum", "needs local.steps: 1 and local.momentum: 0 (momentum twice)"


def _selection_contradictions(section: str, selection: Selection) -> Iterator[tuple[str, str]]:
    if selection.method not in ("topk", "random"):
        for key in ("warmup", "client_densities"):
            if getattr(selection, key, None):
                yield f"{section}.{key}", f"method {selection.method} has no density"
    if selection.method == "random" and selection.scope == "chunk":
        yield f"{section}.scope", "a random choice is global or by layer"
    if selection.method == "threshold" and selection.relative and selection.threshold >= 1:
        yield f"{section}.threshold", "nothing is above the largest: relative needs one below 1"


def _network_contradictions(network: Network) -> Iterator[tuple[str, str]]:
    for key, profiles in (("links", LINKS), ("devices", DEVICES)):
        for message in wrong_shares(getattr(network, key), list(profiles)):
            yield f"network.{key}", message
        if getattr(network, key) and network.clients_file:
            yield f"network.{key}", "clients_file says this already; give one of the two"
    for key, is_given in (("spread", network.spread), ("ms_per_example", network.is_measured)):
        if is_given and network.clients_file:
            yield f"network.{key}", "clients_file says this already; give one of the two"
    if (network.availability.name == "trace") != bool(network.availability.file):
        yield "network.availability.file", "goes with availability.name: trace; give both or none"


def _read_network_files(config: Config, settings: Settings) -> None:
    """Read what the network's files say, for their errors. Raises ConfigError."""
    from network.availability import make_availability
    from network.graph import make_graph
    from network.population import make_population  # numpy takes a while: all else is checked

    network, num_clients = config.network.at_speed(1.0), config.clients.total
    try:
        make_population(network, num_clients, config.seed, from_here)
        make_availability(network.availability, num_clients, config.seed, from_here)
        if config.schedule.name == "gossip":
            make_graph(config.schedule, num_clients, config.seed, from_here)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        place = settings.place("network")
        raise ConfigError(f"{place}: {error.filename}: cannot be read: {error.strerror}") from None
