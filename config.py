"""The settings of a run: typed, checked, and read from defaults < YAML < command line.

Every setting has one home, a dataclass field below; its name is the YAML key and the command-line
key (`python main.py server.lr=0.01`). A mistake ends as one line that names the file, the line
and the nearest valid name. This file imports no torch, so such a line is instant.
"""

import argparse
import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(Exception):
    """A setting is wrong; the message is one line that says where and what to do."""


def one_of(default: str, *others: str) -> Any:
    """A field that takes one of the named words."""
    return field(default=default, metadata={"choices": (default, *others)})


def between(default: Any, low: float, high: float = math.inf, open_low: bool = False) -> Any:
    """A numeric field with low <= value <= high (low < value if open_low)."""
    return field(default=default, metadata={"range": (low, high, open_low)})


@dataclass(frozen=True)
class Partition:
    name: str = "iid"  # a flwr-datasets partitioner in snake_case: iid, dirichlet, shard, ...
    args: dict[str, Any] = field(default_factory=dict)  # that partitioner's own arguments


@dataclass(frozen=True)
class Data:
    name: str = "cifar10"  # cifar10, digits, imagefolder, or a Hugging Face data set
    root: str = "data"  # the folder or zip file that holds it
    fallback: str = ""  # what to use where it cannot be had; "" refuses to start
    padding: int | None = between(None, 0)  # pixels around a random crop; 0: none; null: side / 8
    flip: bool | None = None  # random horizontal flip; null: yes, but not for digits
    partition: Partition = field(default_factory=Partition)


@dataclass(frozen=True)
class Model:
    name: str = one_of("resnet18", "resnet50", "cnn", "lenet")
    stem: str = one_of("cifar", "imagenet")  # ResNets only: 3x3 or 7x7 and a pool
    norm: str = "batch"  # ResNets only: batch, or group(n) for n channel groups
    width: float = between(1.0, 0.0, open_low=True)  # times the usual number of channels


@dataclass(frozen=True)
class Clients:
    total: int = between(10, 1)
    per_round: int = between(10, 1)  # the cohort
    state_memory_gib: float = between(2.0, 0.0, open_low=True)  # residuals in a rank's RAM, at most


@dataclass(frozen=True)
class Schedule:
    name: str = one_of("constant", "cosine", "exponential", "step")
    gamma: float = between(0.1, 0.0, 1.0, open_low=True)  # factor of exponential and step
    milestones: list[int] = field(default_factory=list)  # rounds after which step applies gamma


@dataclass(frozen=True)
class Local:
    algorithm: str = one_of("FedAvg")
    epochs: int = between(1, 1)
    steps: int | None = between(None, 1)  # this many batches a round, in place of epochs
    batch_size: int = between(64, 1)
    optimizer: str = one_of("SGD")
    lr: float = between(0.05, 0.0, open_low=True)
    lr_schedule: Schedule = field(default_factory=Schedule)
    momentum: float = between(0.9, 0.0, 1.0)
    nesterov: bool = False
    weight_decay: float = between(5e-4, 0.0)
    clip: float = between(0.0, 0.0)  # largest L2 norm of a batch's gradient; 0: no clipping


@dataclass(frozen=True)
class Pruning:
    method: str = one_of("topk", "threshold", "none")
    density: float = between(0.01, 0.0, 1.0, open_low=True)  # topk: share of coordinates sent
    scope: str = one_of("global", "layer")  # topk: rank over the whole vector or per tensor
    threshold: float = between(0.0, 0.0)  # threshold: send coordinates with abs(value) above it


@dataclass(frozen=True)
class Uplink:
    values: str = one_of("int8", "fp32", "fp16", "bf16")
    error_feedback: bool = True  # what was not sent is added to the client's next update


@dataclass(frozen=True)
class Downlink:
    values: str = one_of("fp32", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class Server:
    """null leaves a setting to the optimizer's own default, see afo.py."""

    optimizer: str = "FedAvg"  # FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi or a torch.optim name
    weighting: str = one_of("examples", "uniform")  # how clients are averaged
    lr: float | None = between(None, 0.0, open_low=True)
    momentum: float | None = between(None, 0.0, 1.0)
    nesterov: bool | None = None
    beta1: float | None = between(None, 0.0, 1.0)
    beta2: float | None = between(None, 0.0, 1.0)
    tau: float | None = between(None, 0.0, open_low=True)
    v0: float | None = between(None, 0.0)
    bias_correction: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)  # arguments of a torch.optim optimizer
    scheduler: str = ""  # a torch.optim.lr_scheduler name, stepped once a round
    scheduler_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """The simulated link and device of every client; only simulated_seconds depends on it."""

    uplink_mbps: float = between(10.0, 0.0, open_low=True)  # 10^6 bits per second
    downlink_mbps: float = between(50.0, 0.0, open_low=True)
    latency_ms: float = between(50.0, 0.0)  # once per message
    ms_per_example: float = between(5.0, 0.0)  # training time of one example on the device


@dataclass(frozen=True)
class Evaluation:
    every: int = between(1, 1)  # rounds
    last: int = between(5, 1)  # test_accuracy_mean is over this many last evaluations
    batch_size: int = between(500, 1)


@dataclass(frozen=True)
class Checkpoint:
    every: int = between(10, 1)  # rounds
    resume: str = one_of("auto", "never")


@dataclass(frozen=True)
class Config:
    name: str = "run"
    seed: int = between(1, 0)
    rounds: int = between(10, 1)
    output_dir: str = "outputFolder"
    device: str = one_of("auto", "cpu", "cuda")
    precision: str = one_of("auto", "fp32", "bf16", "fp16")  # auto: bf16 where it is faster
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])  # Accelerate's trackers
    deepspeed_config: str = "deepspeed_config.json"
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    clients: Clients = field(default_factory=Clients)
    local: Local = field(default_factory=Local)
    pruning: Pruning = field(default_factory=Pruning)
    uplink: Uplink = field(default_factory=Uplink)
    downlink: Downlink = field(default_factory=Downlink)
    server: Server = field(default_factory=Server)
    network: Network = field(default_factory=Network)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    def seed_for(self, purpose: str, round: int = 0, client: int = 0) -> int:
        """The 63-bit seed of one stream of draws; nothing in a run draws from anywhere else."""
        words = f"{self.seed}/{purpose}/{round}/{client}".encode()
        return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little") >> 1

    @property
    def run_folder(self) -> Path:
        return Path(self.output_dir) / f"{self.name}-s{self.seed}"

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(asdict(self)))


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
    if config.server.scheduler_options and not config.server.scheduler:
        yield "server.scheduler_options", "given without server.scheduler"


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
