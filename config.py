"""The settings of a run: every setting has one home, a dataclass field below.

Its name is the YAML key and the command-line key (`python main.py server.lr=0.01`). Ranges and
choices stand with the field; command_line.py reads and checks them. No torch is imported here, so
that a mistake is answered at once.

A path of a Config is relative to the project folder, in which this file stands; from_here() turns
it into one that a process can open.
"""

import hashlib
import math
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parent
# Keys and sections that change nothing that is computed: a run may go on with others.
NEUTRAL = ("output_dir", "trackers", "clients.state_memory_gib", "distributed.timeout_seconds")
NEUTRAL += ("checkpoint",)
# Text that a reader of YAML could take for a number, a date, true, false or null.
UNCLEAR = re.compile(r"([-+.]*\d.*|(?i:yes|no|on|off|y|n|none|[-+.]*(nan|inf|infinity)))\Z")


class ConfigError(Exception):
    """A setting is wrong; the message is one line that says where and what to do."""


def one_of(default: str, *others: str) -> Any:
    """A field that takes one of the named words."""
    return field(default=default, metadata={"choices": (default, *others)})


def between(default: Any, low: float, high: float = math.inf, open_low: bool = False) -> Any:
    """A numeric field with low <= value <= high (low < value if open_low)."""
    return field(default=default, metadata={"range": (low, high, open_low)})


def each_between(low: float, high: float = math.inf, open_low: bool = False) -> Any:
    """A list of numbers in that range; the default is an empty list."""
    return field(default_factory=list, metadata={"range": (low, high, open_low)})


def path_to(default: str) -> Any:
    """A field that names a file or a folder."""
    return field(default=default, metadata={"path": True})


def from_here(path: str) -> Path:
    """A path of a Config as it is written in the working directory: short below it, else whole."""
    whole, here = Path(os.path.normpath(PROJECT / path)), Path.cwd()
    return whole.relative_to(here) if whole.is_relative_to(here) else whole


@dataclass(frozen=True)
class Partition:
    name: str = "iid"  # a flwr-datasets partitioner in snake_case: iid, dirichlet, shard, ...
    args: dict[str, Any] = field(default_factory=dict)  # that partitioner's own arguments


@dataclass(frozen=True)
class Diversity:
    """What differs between clients besides their labels, see data/diversity.py; 0 is off.

    Each client draws its own strength of noise, blur, brightness and colour, up to the value here.
    """

    quantity: float = between(0.0, 0.0, 5.0)  # a client keeps exp(-quantity |z|) of its pictures
    noise: float = between(0.0, 0.0, 1.0)  # deviation, as a share of the range black to white
    blur: float = between(0.0, 0.0, 10.0)  # deviation in pixels
    brightness: float = between(0.0, 0.0, 8.0)  # stops (factors of 2) brighter or darker
    colour: float = between(0.0, 0.0, 8.0)  # the same, for each colour channel by itself
    relabelled: float = between(0.0, 0.0, 1.0)  # share of clients that permute the classes' labels


@dataclass(frozen=True)
class Data:
    name: str = "cifar10"  # cifar10, digits, imagefolder, or a Hugging Face data set
    root: str = path_to("data")  # the folder or zip file that holds it
    fallback: str = ""  # what to use where it cannot be had; "" refuses to start
    padding: int | None = between(None, 0)  # pixels around a random crop; 0: none; null: side / 8
    flip: bool | None = None  # random horizontal flip; null: yes, but not for digits
    crop: int | None = between(None, 8)  # side of the crop, a central one in tests; null: whole
    validation: float = between(0.0, 0.0, 0.5)  # share of the training pictures, to tune on
    partition: Partition = field(default_factory=Partition)
    diversity: Diversity = field(default_factory=Diversity)


@dataclass(frozen=True)
class Model:
    name: str = one_of("resnet18", "resnet50", "resnet18v2", "cnn", "lenet")
    stem: str = one_of("cifar", "imagenet")  # ResNets only: 3x3 or 7x7 and a pool
    norm: str = "batch"  # ResNets only: batch, or group(n) for n channel groups
    # What becomes of norm layers: statistics averaged; the layers stay with each client (FedBN);
    # statistics frozen at mean 0, variance 1; statistics counted for evaluation only (HeteroFL)
    norm_policy: str = one_of("average", "local", "frozen", "static")
    width: float = between(1.0, 0.0, open_low=True)  # times the usual number of channels

    @property
    def has_batch_norm(self) -> bool:
        return self.name.startswith("resnet") and self.norm == "batch"


@dataclass(frozen=True)
class Submodel:
    """Narrower networks for clients that can do less, see docs/submodels.md."""

    widths: list[float] = each_between(0.0, 1.0, open_low=True)  # shares of the channels, from 1
    # Who trains which: client i widths[i % n], or the widest that meets schedule.deadline_seconds
    assignment: str = one_of("even", "capability")
    ordered_dropout: bool = False  # FjORD: each batch trains a width up to the client's own


@dataclass(frozen=True)
class Clients:
    total: int = between(10, 1)
    per_round: int = between(10, 1)  # the cohort
    state_memory_gib: float = between(
        2.0, 0.0, open_low=True
    )  # clients' states in a rank's RAM, at most


@dataclass(frozen=True)
class LrSchedule:
    name: str = one_of("constant", "cosine", "exponential", "step")
    gamma: float = between(0.1, 0.0, 1.0, open_low=True)  # factor of exponential and step
    milestones: list[int] = each_between(1)  # rounds after which step applies gamma


@dataclass(frozen=True)
class Local:
    """How a client trains. options: settings of the algorithm, such as mu of FedProx.

    Client i trains client_steps[i % how many] batches a round, if any.
    SGD takes lr, momentum, nesterov and weight_decay. Any other optimizer takes lr and, in
    optimizer_options, its own arguments; momentum, nesterov and weight_decay stay as they are here.
    """

    algorithm: str = "FedAvg"  # one of algorithms.py's, such as SCAFFOLD
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int = between(1, 1)
    steps: int | None = between(None, 1)  # this many batches a round, in place of epochs
    client_steps: list[int] = each_between(1)
    fit_deadline: bool = False  # each client trains as many of its batches as leave time to send
    batch_size: int = between(64, 1)
    optimizer: str = "SGD"  # a torch.optim name, such as AdamW
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    optimizer_state: str = one_of("fresh", "kept")  # of a client, when its next round begins
    lr: float = between(0.05, 0.0, open_low=True)
    lr_schedule: LrSchedule = field(default_factory=LrSchedule)
    momentum: float = between(0.9, 0.0, 1.0)
    nesterov: bool = False
    weight_decay: float = between(5e-4, 0.0)
    clip: float = between(0.0, 0.0)  # largest L2 norm of a batch's gradient; 0: no clipping
    # logits count with so many times the log of the client's own class shares; 0: as they are
    logit_adjustment: float = between(0.0, 0.0)
    lanes: str = "auto"  # how many clients a device trains at once; auto: as many as is fastest


@dataclass(frozen=True)
class Selection:
    """Which coordinates travel."""

    method: str = one_of("topk", "random", "threshold", "none")
    density: float = between(0.01, 0.0, 1.0, open_low=True)  # topk, random: share of coordinates
    warmup: list[float] = each_between(0.0, 1.0, open_low=True)  # the first densities (DGC)
    warmup_rounds: int = between(1, 1)  # how many rounds each of them lasts
    # topk: rank over the vector, a tensor, a chunk; random, layer: more of small tensors
    scope: str = one_of("global", "layer", "chunk")
    chunk: int = between(4096, 1)  # entries of a chunk
    threshold: float = between(0.0, 0.0)  # threshold: send coordinates with abs(value) above it
    relative: bool = False  # the threshold is a share of the largest abs(value)


@dataclass(frozen=True)
class Mask:
    """Pruning of the model itself: one mask that all share, so that only values travel."""

    method: str = one_of("none", "snip", "dynamic")
    density: float = between(0.1, 0.0, 1.0, open_low=True)  # share of the weights that stay
    batches: int = between(1, 1)  # on which a client looks at the gradients that decide
    every: int = between(10, 1)  # dynamic: rounds between two changes of the mask
    share: float = between(0.3, 0.0, 1.0)  # dynamic: share of the mask that changes, at first


@dataclass(frozen=True)
class Pruning(Selection):
    """Of the clients' updates; client i has the density client_densities[i % how many], if any."""

    client_densities: list[float] = each_between(0.0, 1.0, open_low=True)
    shared: bool = False  # random: all clients of a round send the same coordinates
    fit_deadline: bool = False  # each client's density, at most `density`, is what arrives in time
    mask: Mask = field(default_factory=Mask)


@dataclass(frozen=True)
class Uplink:
    """budget, such as 100x, settles the others and what `pruning` selects: see budget.py."""

    budget: str = ""  # so many times fewer bytes than dense
    values: str = "int8"  # a coder, see compression.py
    # eden(R): client i sends client_bits[i % how many] bits a value in place of R, if any
    client_bits: list[float] = each_between(0.001, 1.0)
    error_feedback: bool = True  # what was not sent is added to the client's next update
    decay: float = between(1.0, 0.0, 1.0)  # factor of what is owed, each time it is added
    momentum: float = between(0.0, 0.0, 1.0)  # DGC's momentum correction, for local.steps: 1
    dense_below: int = between(0, 0, 2**32 - 1)  # smaller tensors travel whole, in fp32


@dataclass(frozen=True)
class Downlink:
    """budget, such as 100x, settles the others: see budget.py."""

    budget: str = ""  # so many times fewer bytes than dense
    # The whole model, its change with error feedback, or what each client's own copy lacks.
    mode: str = one_of("model", "change", "copies")
    values: str = "fp32"
    dense_below: int = between(0, 0, 2**32 - 1)
    pruning: Selection = field(default_factory=lambda: Selection(method="none"))  # change, copies


@dataclass(frozen=True)
class Server:
    """null leaves a setting to the optimizer's own default, see afo.py."""

    optimizer: str = "FedAvg"  # one of afo.py's, such as FedYogi, or a torch.optim name
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
class Availability:
    """When clients are there, and how many of them drop out in the middle of a round."""

    name: str = one_of("always", "diurnal", "trace")
    period_hours: float = between(24.0, 0.0, open_low=True)  # diurnal: of a client's on and off
    share: float = between(0.5, 0.0, 1.0, open_low=True)  # diurnal: of the period that it is there
    file: str = path_to("")  # trace: a CSV file of client,from,to in seconds
    dropout: float = between(0.0, 0.0, 1.0)  # probability that a client drops out of a round


@dataclass(frozen=True)
class Network:
    """The simulated links and devices, see docs/network.md. A client without a profile has the
    figures below; one with a profile of a link or a device has those of network/profiles.py."""

    uplink_mbps: float = between(10.0, 0.0, open_low=True)  # 10^6 bits per second
    downlink_mbps: float = between(50.0, 0.0, open_low=True)
    latency_ms: float = between(50.0, 0.0)  # one way, once per message
    jitter_ms: float = between(0.0, 0.0)  # standard deviation of a message's latency
    loss: float = between(0.0, 0.0, 0.99)  # share of packets that are lost
    # Training time of one example; a phone's. auto: this machine's, measured once
    ms_per_example: float | str = between(5.0, 0.0)
    memory_gib: float | None = between(None, 0.0, open_low=True)  # of a device; null: enough
    spread: float = between(0.0, 0.0)  # standard deviation of ln(bandwidth) and of ln(speed)
    links: dict[str, Any] = field(default_factory=dict)  # shares of profiles: {4g: 1}
    devices: dict[str, Any] = field(default_factory=dict)  # likewise: {phone: 0.9, laptop: 0.1}
    clients_file: str = path_to("")  # a CSV file with a row for each client, in place of the above
    uplink_trace: str = path_to("")  # packets' times in ms, in place of everybody's uplink_mbps
    downlink_trace: str = path_to("")
    server_egress_mbps: float | None = between(None, 0.0, open_low=True)  # null: unlimited
    server_ingress_mbps: float | None = between(None, 0.0, open_low=True)
    availability: Availability = field(default_factory=Availability)

    @property
    def is_measured(self) -> bool:
        """Whether this machine's speed stands for a phone's."""
        return self.ms_per_example == "auto"

    def at_speed(self, measured: float) -> "Network":
        """The same where ms_per_example is a number: the measured one in place of auto."""
        return replace(self, ms_per_example=measured) if self.is_measured else self


@dataclass(frozen=True)
class Schedule:
    """For whom the server waits before it steps."""

    name: str = one_of(
        "synchronous", "semi_synchronous", "fedbuff", "fedasync", "hierarchical", "gossip"
    )
    over_selection: float = between(1.0, 1.0)  # so many times per_round begin; the fastest count
    deadline_seconds: float | None = between(None, 0.0, open_low=True)  # of a round; null: none
    late: str = one_of("drop", "carry")  # synchronous: updates after the deadline
    # semi_synchronous: how long each client trains; null: as long as the slowest one takes
    period_seconds: float | None = between(None, 0.0, open_low=True)
    sampling: str = "uniform"  # synchronous: who begins a round, see federation/samplers.py
    tiers: int = between(5, 1)  # tifl: groups of equally fast clients
    concurrency: int | None = between(None, 1)  # asynchronous: under way at once; null: per_round
    buffer: int = between(10, 1)  # fedbuff: how many updates make a step
    staleness_power: float = between(0.5, 0.0)  # a of the weight (1 + s)^-a of an old update
    mixing: float = between(0.6, 0.0, 1.0, open_low=True)  # fedasync: alpha, a fresh model's share
    edges: int = between(2, 1)  # hierarchical: edge servers; client i is below edge i % edges
    edge_rounds: int = between(1, 1)  # hierarchical: of an edge server, in a round of the cloud
    edge_link: str = "edge_box"  # hierarchical: to the cloud, a profile of network/profiles.py
    gossip: str = one_of("CHOCO-SGD", "D-PSGD")  # what neighbours send: changes, or whole models
    gamma: float = between(0.3, 0.0, 1.0, open_low=True)  # CHOCO-SGD: how far a node moves to them
    graph: str = one_of("ring", "complete", "torus", "erdos_renyi", "file")  # gossip: of the nodes
    edge_probability: float = between(0.5, 0.0, 1.0, open_low=True)  # erdos_renyi: of each pair
    graph_file: str = path_to("")  # file: a CSV file of node,neighbour


@dataclass(frozen=True)
class Distributed:
    """How the processes of a run work together, see docs/ranks.md."""

    engine: str = one_of("auto", "accelerate", "deepspeed")  # auto: deepspeed under its launcher
    ranks_per_client: int = between(1, 1)  # processes that train one client together
    exchange: str = one_of("gather", "allreduce")  # payloads; or sums, equal to 1e-6
    timeout_seconds: int = between(1800, 1)  # how long a process waits for the slowest


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
    name: str = "run"  # command_line.py adds what the command line changed
    seed: int = between(1, 0)
    rounds: int = between(10, 1)
    output_dir: str = path_to("outputFolder")
    device: str = one_of("auto", "cpu", "cuda")
    precision: str = one_of("auto", "fp32", "bf16", "fp16")  # auto: bf16 where it is faster
    # Kernels that give equal bits twice; auto: if a step then takes less than a tenth longer
    deterministic: str = one_of("auto", "true", "false")
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])  # Accelerate's trackers
    deepspeed_config: str = path_to("deepspeed_config.json")  # "" for none
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    submodel: Submodel = field(default_factory=Submodel)
    clients: Clients = field(default_factory=Clients)
    local: Local = field(default_factory=Local)
    pruning: Pruning = field(default_factory=Pruning)
    uplink: Uplink = field(default_factory=Uplink)
    downlink: Downlink = field(default_factory=Downlink)
    server: Server = field(default_factory=Server)
    network: Network = field(default_factory=Network)
    schedule: Schedule = field(default_factory=Schedule)
    distributed: Distributed = field(default_factory=Distributed)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    def seed_for(self, purpose: str, round: int = 0, client: int = 0) -> int:
        """The 63-bit seed of one stream of draws; nothing in a run draws from anywhere else."""
        words = f"{self.seed}/{purpose}/{round}/{client}".encode()
        return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little") >> 1

    @property
    def run_folder(self) -> Path:
        return from_here(self.output_dir) / f"{self.name}-s{self.seed}"

    def to_yaml(self) -> str:
        return yaml.dump(asdict(self), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes unclear text in quotes, so that every reader takes it for text."""


_Dumper.add_implicit_resolver("!unclear", UNCLEAR, None)
