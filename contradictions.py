"""Settings that are fine alone and make no sense together, each with what to do instead.

No torch is imported here. What can only be said with it stands in federation/compatibility.py.
"""

import difflib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from config import Config, Network, Schedule, Selection, Server
from network.profiles import DEVICES, LINKS


def contradictions_of(config: Config) -> Iterator[tuple[str, str]]:
    """The key that is to change, and why."""
    clients, local = config.clients, config.local
    if clients.per_round > clients.total:
        yield "clients.per_round", f"{clients.per_round} is more than clients.total={clients.total}"
    if local.nesterov and local.momentum == 0:
        yield "local.nesterov", "needs local.momentum above 0"
    if not re.fullmatch(r"auto|[1-9]\d*", local.lanes):
        yield "local.lanes", f"{local.lanes!r} is neither auto nor a whole number from 1"
    elif local.lanes not in ("auto", "1"):
        yield from _lane_contradictions(config)
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
    if len(config.pruning.client_densities) > clients.total:
        yield "pruning.client_densities", f"more densities than clients.total={clients.total}"
    if len(local.client_steps) > clients.total:
        yield "local.client_steps", f"more numbers than clients.total={clients.total}"
    yield from _momentum_contradictions(config)
    yield from _selection_contradictions("pruning", config.pruning)
    yield from _selection_contradictions("downlink.pruning", config.downlink.pruning)
    yield from _norm_contradictions(config)
    if config.server.scheduler_options and not config.server.scheduler:
        yield "server.scheduler_options", "given without server.scheduler"
    yield from _network_contradictions(config.network)
    for section in ("local", "pruning"):
        if getattr(config, section).fit_deadline and config.schedule.deadline_seconds is None:
            yield f"{section}.fit_deadline", "fits to schedule.deadline_seconds, and none is set"
    if local.fit_deadline and local.client_steps:
        yield "local.client_steps", "local.fit_deadline chooses them; give one of the two"
    if config.pruning.fit_deadline and config.pruning.method not in ("topk", "random"):
        yield "pruning.fit_deadline", f"method {config.pruning.method} has no density"
    yield from _schedule_contradictions(config)


def _norm_contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """What the norm layers of the network do not take."""
    model = config.model
    if not re.fullmatch(r"batch|group\([1-9]\d*\)", model.norm):
        yield "model.norm", f"{model.norm!r} is neither batch nor group(n), such as group(2)"
    if model.norm_policy != "average" and not model.name.startswith("resnet"):
        yield "model.norm_policy", f"{model.name} has no norm layers"
    if model.norm_policy in ("frozen", "static") and model.norm != "batch":
        yield "model.norm_policy", f"{model.norm} has no statistics: use average"
    normalises = model.name.startswith("resnet") and model.norm == "batch"
    if config.distributed.ranks_per_client > 1 and normalises and model.norm_policy != "frozen":
        yield (
            "distributed.ranks_per_client",
            "each rank's BatchNorm would see a part of the batch; use model.norm=group(2)",
        )


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
    if local.steps != 1 or local.momentum or local.client_steps:
        yield "uplink.momentum", "needs local.steps: 1 and local.momentum: 0 (momentum twice)"


def _selection_contradictions(section: str, selection: Selection) -> Iterator[tuple[str, str]]:
    if selection.method not in ("topk", "random"):
        for key in ("warmup", "client_densities"):
            if getattr(selection, key, None):
                yield f"{section}.{key}", f"method {selection.method} has no density"
    if selection.method == "threshold" and selection.relative and selection.threshold >= 1:
        yield f"{section}.threshold", "nothing is above the largest: relative needs one below 1"


def _schedule_contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """What the schedule of the config does not take."""
    if config.schedule.period_seconds is not None and config.schedule.name != "semi_synchronous":
        yield "schedule.period_seconds", "goes with schedule.name: semi_synchronous"
    if config.schedule.late == "carry":
        yield from _carry_contradictions(config)
    checks = {
        "semi_synchronous": [_semi_synchronous_contradictions],
        "fedbuff": [_asynchronous_contradictions],
        "fedasync": [_asynchronous_contradictions],
        "hierarchical": [_topology_contradictions],
        "gossip": [_topology_contradictions, _gossip_contradictions],
    }
    for check in checks.get(config.schedule.name, []):
        yield from check(config)


def _carry_contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """What needs every update in the round in which it began."""
    if config.schedule.name != "synchronous" or config.schedule.deadline_seconds is None:
        yield "schedule.late", "carry goes with name: synchronous and a deadline_seconds"
    if config.pruning.mask.method == "dynamic":
        yield "pruning.mask.method", "a dynamic mask changes while late updates are under way"
    if config.local.algorithm not in ("FedAvg", "FedProx", "FedNova"):
        yield "local.algorithm", "schedule.late: carry takes FedAvg, FedProx and FedNova"
    if config.model.norm_policy == "local":
        yield "model.norm_policy", "with schedule.late: carry a round may have no models to score"
    if config.distributed.exchange != "gather":
        yield "distributed.exchange", "schedule.late: carry keeps payloads; use gather"


def _semi_synchronous_contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """What would end a round before all have sent, or sets the steps of clients as well."""
    for key in ("over_selection", "deadline_seconds"):
        if getattr(config.schedule, key) != getattr(Schedule(), key):
            yield (
                f"schedule.{key}",
                "semi_synchronous waits for all; use name: synchronous",
            )
    if config.local.client_steps:
        yield "local.client_steps", "semi_synchronous chooses them; leave it out"
    if config.uplink.momentum:
        yield "uplink.momentum", "is for one step a round, and semi_synchronous makes it many"


def _asynchronous_contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """What needs all clients of a round to begin with the same model."""
    schedule, name = config.schedule, config.schedule.name
    for key in ("over_selection", "deadline_seconds", "sampling"):
        if getattr(schedule, key) != getattr(Schedule(), key):
            yield f"schedule.{key}", f"{name} waits for no round; use schedule.name: synchronous"
    if (schedule.concurrency or 1) > config.clients.total:
        yield "schedule.concurrency", f"more than clients.total={config.clients.total} clients"
    if config.pruning.mask.method != "none":
        yield "pruning.mask.method", f"a mask changes between rounds, and {name} has none"
    if config.downlink.mode != "model":
        yield "downlink.mode", f"with {name} clients begin at any time; use downlink.mode: model"
    if config.local.algorithm not in ("FedAvg", "FedProx"):
        yield "local.algorithm", f"{name} takes FedAvg and FedProx"
    if config.distributed.exchange != "gather":
        yield "distributed.exchange", f"{name} keeps payloads until they arrive; use gather"


def _topology_contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """What belongs to a star: one server that waits for clients and sends to all of them."""
    schedule, network, name = config.schedule, config.network, config.schedule.name
    for key in ("over_selection", "deadline_seconds", "sampling"):
        if getattr(schedule, key) != getattr(Schedule(), key):
            yield f"schedule.{key}", f"{name} waits for all; use schedule.name: synchronous"
    if network.availability.name != "always" or network.availability.dropout:
        yield "network.availability", f"{name} waits for all, so that nobody may leave"
    for key in ("server_egress_mbps", "server_ingress_mbps"):
        if getattr(network, key) is not None:
            yield f"network.{key}", f"in {name} most messages do not pass the server; use null"
    if config.pruning.mask.method != "none":
        yield "pruning.mask.method", f"a mask needs one server, and {name} has none for all"
    if config.downlink.mode != "model":
        yield "downlink.mode", f"{name} has no one server that knows who has what; use model"
    if config.local.algorithm not in ("FedAvg", "FedProx"):
        yield "local.algorithm", f"{name} takes FedAvg and FedProx"
    if name == "hierarchical":
        for key in ("uplink_trace", "downlink_trace"):
            if getattr(network, key):
                yield f"network.{key}", "hierarchical has edge servers, which have other links"
        for message in _wrong_shares({schedule.edge_link: 1.0}, list(LINKS)):
            yield "schedule.edge_link", message


def _gossip_contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """What needs a server, and what would be done twice."""
    clients, schedule = config.clients, config.schedule
    if clients.per_round != clients.total:
        yield "clients.per_round", f"in gossip every node trains: clients.total={clients.total}"
    if replace(config.server, weighting="examples") != Server():
        yield "server", "gossip has no server; leave its settings as they are by default"
    if config.downlink.values != "fp32":
        yield "downlink.values", "gossip has no downlink; use fp32"
    if config.uplink.error_feedback:
        yield "uplink.error_feedback", "CHOCO-SGD itself makes up for what is lost: must be false"
    if schedule.gossip == "D-PSGD" and config.pruning.method != "none":
        yield "pruning.method", "D-PSGD sends whole models: must be none, or gossip CHOCO-SGD"
    if config.model.norm_policy == "local":
        yield "model.norm_policy", "in gossip each node has a model of its own; use average"
    if config.distributed.ranks_per_client > 1:
        yield "distributed.ranks_per_client", "in gossip one rank trains a node; use 1"
    if config.distributed.exchange != "gather":
        yield "distributed.exchange", "gossip has no sum over all nodes; use gather"
    if (schedule.graph == "file") != bool(schedule.graph_file):
        yield "schedule.graph_file", "goes with schedule.graph: file; give both or none"


def _network_contradictions(network: Network) -> Iterator[tuple[str, str]]:
    for key, profiles in (("links", LINKS), ("devices", DEVICES)):
        for message in _wrong_shares(getattr(network, key), list(profiles)):
            yield f"network.{key}", message
        if getattr(network, key) and network.clients_file:
            yield f"network.{key}", "clients_file says this already; give one of the two"
    if network.spread and network.clients_file:
        yield "network.spread", "clients_file says this already; give one of the two"
    if (network.availability.name == "trace") != bool(network.availability.file):
        yield "network.availability.file", "goes with availability.name: trace; give both or none"


def _wrong_shares(shares: dict[str, Any], profiles: list[str]) -> Iterator[str]:
    """What is wrong with the shares of a mixture of profiles."""
    for name, share in shares.items():
        if name not in profiles:
            near = difflib.get_close_matches(name, profiles, 1) or profiles
            yield f"there is no profile {name!r}; did you mean {' or '.join(near)}?"
        elif type(share) not in (int, float) or not 0 <= share <= 1:
            yield f"{name}: {share!r} is not a share, a number from 0 to 1"
    if shares and all(type(share) in (int, float) for share in shares.values()):
        if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
            yield f"the shares sum to {sum(shares.values()):g}, not to 1"
