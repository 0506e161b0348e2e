"""From a config to what a federation consists of: data, shards, network, both ends."""

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
from network.availability import make_availability
from network.population import Population, make_population
from network.simulation import Simulation
from training.flat_model import FlatModel


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
    if alone and config.model.norm == "batch" and config.model.name.startswith("resnet"):
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


def build_model(config: Config, pictures: Pictures, device: torch.device) -> FlatModel:
    """The network with its first weights. Raises ConfigError."""
    model = config.model
    try:
        network = build_network(
            model.name,
            pictures.num_classes,
            pictures.image_size,
            config.seed_for("network"),
            model.stem,
            model.norm,
            model.width,
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    return FlatModel(network, device, model.norm_policy == "frozen")


def make_server(config: Config, model: FlatModel, num_examples: list[int]) -> Server:
    """The server, with an agreement of its own. Raises ConfigError."""
    return Server(
        config,
        Agreement(config, model.layout, model.buffer_layout),
        model.read_parameters(),
        model.read_buffers(),
        model.is_counter,
        model.is_variance,
        num_examples,
    )


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
