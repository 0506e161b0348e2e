"""From a config to what a federation consists of: data, shards, network, both ends."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from cnn_model import build_network
from config import Config, ConfigError, Network, from_here
from data import (
    Dataset,
    Pictures,
    diversify,
    hold_out,
    load_dataset,
    partition_labels,
    skew_quantities,
)
from distributed import Ranks
from federation.agreement import Agreement
from federation.client import Clients
from federation.client_store import ClientStore
from federation.clock import Clock
from federation.server import Server
from federation.slices import Slice, slice_positions
from federation.submodel_clients import SubmodelClients
from federation.submodel_server import SubmodelServer
from federation.widths import Width, Widths
from network.availability import make_availability
from network.population import Population, make_population
from network.simulation import Simulation
from training.engines import num_state_vectors
from training.flat_model import FlatModel
from training.footprint import footprint
from training.ordered_dropout import OrderedDropoutEngine
from training.scaler import scale_outputs


def load_data(config: Config) -> Dataset:
    """The data set of the config, with the validation pictures held out. Raises DataError."""
    data = config.data
    dataset = load_dataset(data.name, str(from_here(data.root)), data.fallback)
    if data.validation:
        dataset = hold_out(dataset, data.validation, config.seed_for("validation"))
    return dataset


def make_pictures(config: Config, dataset: Dataset, device: torch.device) -> Pictures:
    """The data set on the device, with the config's augmentation."""
    data, side = config.data, dataset.train_images.shape[1]
    padding = data.padding
    if padding is None:
        padding = 0 if data.crop else side // 8
    flip = dataset.name != "digits" if data.flip is None else data.flip
    # On a CPU a ResNet whose stem leaves few pixels is a ninth faster with channels first: nearly
    # all of its time goes to weights. Elsewhere they are best last.
    tiny = config.model.stem == "imagenet" and (data.crop or side) < 64
    last = not (tiny and device.type == "cpu")
    return Pictures(dataset, device, padding, flip, data.crop, last)


def partition(config: Config, dataset: Dataset) -> list[np.ndarray]:
    """Each client's pictures, int64 indices. Raises DataError or ConfigError."""
    clients = partition_labels(
        dataset.train_labels.numpy(),
        config.clients.total,
        config.data.partition.name,
        config.data.partition.args,
        config.seed_for("partition"),
    )
    clients = skew_quantities(clients, config.data.diversity.quantity, config.seed_for("quantity"))
    num_candidates = sum(len(indices) > 0 for indices in clients)
    if num_candidates < config.clients.per_round:
        raise ConfigError(
            f"clients.per_round: {config.clients.per_round} is more than the {num_candidates} "
            f"clients that have pictures; lower it, or change data.partition"
        )
    smallest = min(range(len(clients)), key=lambda client: len(clients[client]) or np.inf)
    alone = min(len(clients[smallest]), config.local.batch_size) == 1
    if alone and config.model.has_batch_norm:
        raise ConfigError(
            f"model.norm: batch cannot train on batches of one example (client {smallest} has "
            f"{len(clients[smallest])}, local.batch_size={config.local.batch_size}); "
            f"use group(2)"
        )
    return clients


def client_data(config: Config, dataset: Dataset, shards: list[np.ndarray]) -> Dataset:
    """The data set with the pictures and labels that the clients train on."""
    settings = asdict(config.data.diversity)
    del settings["quantity"]  # which partition() has applied
    return diversify(dataset, shards, config.seed_for("diversity"), **settings)


def build_model(
    config: Config, pictures: Pictures, device: torch.device, share: float = 1.0
) -> FlatModel:
    """The network, or one with a share of its channels, with first weights. Raises ConfigError."""
    model = config.model
    try:
        network = build_network(
            model.name,
            pictures.num_classes,
            pictures.image_size,
            config.seed_for("network"),
            model.stem,
            model.norm,
            model.width * share,
            tracks_statistics=model.norm_policy != "static",
        )
    except ValueError as error:
        place = "model" if share == 1 else f"submodel.widths: {share:g}"
        raise ConfigError(f"{place}: {error}") from None
    return FlatModel(network, device, model.norm_policy == "frozen")


def build_models(config: Config, pictures: Pictures, model: FlatModel) -> dict[float, FlatModel]:
    """By share of the channels, the widest first: `model`, which is whole, and narrower ones.

    Ordered dropout takes narrower networks as they are; HeteroFL scales their outputs.
    """
    models = {1.0: model}
    for share in config.submodel.widths[1:]:
        models[share] = build_model(config, pictures, model.device, share)
        if not config.submodel.ordered_dropout:
            scale_outputs(models[share].network, share)
    return models


def count_widths(
    config: Config, pictures: Pictures, models: dict[float, FlatModel], population: Population
) -> list[Width]:
    """What each width takes of a device, which is counted only where it decides anything."""
    sizes = {share: model.layout.size for share, model in models.items()}
    if len(models) == 1 and np.isinf(population.memory_gib).all():
        return [Width(1.0, sizes[1.0], 0.0, 1.0)]
    local, counts = config.local, {}
    for share in models:
        model = build_model(config, pictures, torch.device("meta"), share)
        batch = local.batch_size, pictures.image_size
        counts[share] = footprint(model, *batch, num_state_vectors(local))
    choices = []
    for share, count in counts.items():
        flops = [count.flops]
        if config.submodel.ordered_dropout:  # which draws from all widths up to this one
            flops = [other.flops for below, other in counts.items() if below <= share]
        work = sum(flops) / len(flops) / counts[1.0].flops
        choices.append(Width(share, sizes[share], count.num_bytes / 2**30, work))
    return choices


def make_server(config: Config, model: FlatModel, num_examples: list[int]) -> Server:
    """The server, with an agreement of its own. Raises ConfigError."""
    agreement = Agreement(config, model.layout, model.buffer_layout)
    return Server(config, agreement, *_of_a_server(model), num_examples)


def make_submodel_server(
    config: Config, models: dict[float, FlatModel], widths: Widths, num_examples: list[int]
) -> SubmodelServer:
    """The server of clients with networks of several widths. Raises ConfigError."""
    whole, slices = models[1.0], {}
    for share, model in models.items():
        positions = None
        if share < 1:
            places = slice_positions(whole.layout, model.layout)
            positions = torch.from_numpy(places).to(whole.device)
        slices[share] = Slice(_agreement_on(model, whole, config), positions)
    return SubmodelServer(config, slices, widths.share_of, *_of_a_server(whole), num_examples)


def _of_a_server(model: FlatModel) -> tuple[torch.Tensor, ...]:
    """The first model, and which of its buffers are counters and variances."""
    vectors = model.read_parameters(), model.read_buffers()
    return *vectors, model.is_counter, model.is_variance


def _agreement_on(model: FlatModel, whole: FlatModel, config: Config) -> Agreement:
    """What both ends know of a width; a system without compression would send the whole network."""
    return Agreement(config, model.layout, model.buffer_layout, whole.layout.size)


def make_store(config: Config, folder: Path, device: torch.device) -> ClientStore:
    """What the clients of this rank keep; folder: of what does not fit into memory."""
    budget = config.clients.state_memory_gib * 2**30
    return ClientStore(folder, budget, has_gpu=device.type == "cuda")


def make_clock(config: Config, ms_per_example: float) -> Clock:
    """The simulated clock, with every client's link and device. Raises ConfigError.

    ms_per_example: of this machine, where network.ms_per_example is auto.
    """
    network = config.network.at_speed(ms_per_example)
    try:
        population = make_population(network, config.clients.total, config.seed, from_here)
        availability = make_availability(
            network.availability, config.clients.total, config.seed, from_here
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"network: {error}") from None
    links = population
    if config.schedule.name == "hierarchical":
        links = population.followed_by(_edge_servers(config))
    limits = network.server_egress_mbps, network.server_ingress_mbps
    simulation = Simulation(links, *limits, config.seed)
    return Clock(population, simulation, availability, network.availability.dropout)


def _edge_servers(config: Config) -> Population:
    """The links between the edge servers and the cloud."""
    link = Network(links={config.schedule.edge_link: 1.0})
    return make_population(link, config.schedule.edges, config.seed_for("edges"))


def make_clients(
    config: Config,
    model: FlatModel,
    pictures: Pictures,
    shards: list[np.ndarray],
    store: ClientStore,
    ranks: Ranks,
) -> Clients:
    """The clients of this rank, with an agreement of their own."""
    make_engine = None
    if ranks.use_deepspeed and config.local.optimizer != "SGD":
        raise ConfigError("local.optimizer: DeepSpeed's engine takes SGD; start it by torchrun")
    if ranks.use_deepspeed:

        def make_engine(precision: str):
            from training.deepspeed_engine import DeepSpeedEngine  # takes seconds

            return DeepSpeedEngine(model, config, precision, ranks.team, config.run_folder)

    return Clients(
        config,
        Agreement(config, model.layout, model.buffer_layout),
        model,
        pictures,
        [torch.from_numpy(indices).to(ranks.device) for indices in shards],
        store,
        ranks.team,
        make_engine,
    )


def make_submodel_clients(
    config: Config,
    models: dict[float, FlatModel],
    widths: Widths,
    pictures: Pictures,
    shards: list[np.ndarray],
    store: ClientStore,
    ranks: Ranks,
) -> SubmodelClients:
    """The clients of this rank, with agreements of their own. Raises ConfigError."""
    if ranks.use_deepspeed:
        raise ConfigError("submodel.widths: DeepSpeed trains one network; start it by torchrun")
    indices = [torch.from_numpy(some).to(ranks.device) for some in shards]
    by_share = {}
    for share, model in models.items():
        narrower = [other for below, other in models.items() if below < share]
        by_share[share] = Clients(
            config,
            _agreement_on(model, models[1.0], config),
            model,
            pictures,
            indices,
            store,
            ranks.team,
            _ordered_dropout(config, model, narrower, ranks),
        )
    return SubmodelClients(by_share, widths.share_of)


def _ordered_dropout(
    config: Config, model: FlatModel, narrower: list[FlatModel], ranks: Ranks
) -> Callable[[str], OrderedDropoutEngine] | None:
    """What builds the engine of ordered dropout; None if batches train one width."""
    if not config.submodel.ordered_dropout:
        return None
    return lambda precision: OrderedDropoutEngine(
        model, config.local, precision, ranks.team, narrower
    )
