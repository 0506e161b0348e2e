"""Which settings go with which schedule.

No torch is imported here, so that a mistake is answered at once.
"""

from collections.abc import Iterator
from dataclasses import replace

from config import Config, Schedule, Server
from network.profiles import LINKS, wrong_shares

# The settings of how a synchronous round ends, and of how it begins and ends.
END = ("over_selection", "deadline_seconds")
BEGIN_AND_END = ("sampling", *END)


def schedule_contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, what is wrong) for settings that the config's schedule does not take."""
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


def _of_synchronous_alone(
    config: Config, why: str, keys: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Those of the keys that are set; why: the schedule of the config does not take them."""
    for key in keys:
        if getattr(config.schedule, key) != getattr(Schedule(), key):
            yield (
                f"schedule.{key}",
                f"{config.schedule.name} {why}; use schedule.name: synchronous",
            )


def _carry_contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """What needs every update in the round in which it began."""
    if config.schedule.name != "synchronous" or config.schedule.deadline_seconds is None:
        yield "schedule.late", "carry goes with name: synchronous and a deadline_seconds"
    if config.pruning.mask.method == "dynamic":
        yield "pruning.mask.method", "a dynamic mask changes while late updates are under way"
    if config.downlink.mode != "model":
        yield "downlink.mode", "with schedule.late: carry clients may leave with half a change"
    if config.local.algorithm not in ("FedAvg", "FedProx", "FedNova"):
        yield "local.algorithm", "schedule.late: carry takes FedAvg, FedProx and FedNova"
    if config.model.norm_policy == "local":
        yield "model.norm_policy", "with schedule.late: carry a round may have no models to score"
    if config.distributed.exchange != "gather":
        yield "distributed.exchange", "schedule.late: carry keeps payloads; use gather"


def _semi_synchronous_contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """What would end a round before all have sent, or sets the steps of clients as well."""
    yield from _of_synchronous_alone(config, "waits for all", END)
    if config.local.client_steps:
        yield "local.client_steps", "semi_synchronous chooses them; leave it out"
    if config.uplink.momentum:
        yield "uplink.momentum", "is for one step a round, and semi_synchronous makes it many"


def _asynchronous_contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """What needs all clients of a round to begin with the same model."""
    schedule, name = config.schedule, config.schedule.name
    yield from _of_synchronous_alone(config, "waits for no round", BEGIN_AND_END)
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
    yield from _of_synchronous_alone(config, "waits for all", BEGIN_AND_END)
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
        for message in wrong_shares({schedule.edge_link: 1.0}, list(LINKS)):
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
