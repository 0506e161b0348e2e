"""agreement.py: both ends build the same table of messages, and a mask reaches all of it."""

from itertools import product

import numpy as np
import pytest
import torch

from algorithms import ALGORITHMS
from compression import PayloadError
from config import Config, Downlink, Local, Mask, Model, Pruning, Selection, Uplink
from federation.agreement import Agreement
from federation.messages import SERVER
from layout import Layout

LAYOUT, BUFFERS = Layout(("w", "b"), ((30, 20), (30,))), Layout(("mean", "var"), ((3,), (3,)))
NAMES = ("update", "model", "control", "momentum", "buffers", "scores", "growth")
NAMES += ("mask", "mask_change", "model_change", "control_change", "momentum_change")
SIZE = LAYOUT.size
RANDOM = Pruning(method="random", density=0.3)
HALF = np.arange(0, SIZE, 2)


def agree(algorithm="FedAvg", mode="model", pruning=RANDOM, **settings) -> Agreement:
    change = Selection(method="none" if mode == "model" else "random", density=0.2)
    config = Config(
        local=Local(algorithm=algorithm),
        pruning=pruning,
        uplink=Uplink(values="qsgd4"),
        downlink=Downlink(mode=mode, values="fp16", pruning=change),
        **settings,
    )
    return Agreement(config, LAYOUT, BUFFERS)


def table(agreement: Agreement) -> set[tuple[str, str]]:
    """(direction, name) of all kinds that an agreement has."""

    def has(direction, name):
        try:
            return bool(agreement.channel(direction, name))
        except KeyError:
            return False

    return {key for key in product(("up", "down"), NAMES) if has(*key)}


def vector(seed: int = 0) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


VECTORS = {  # (algorithm, downlink.mode): what travels besides update and model
    ("SCAFFOLD", "model"): {("up", "control"), ("down", "control")},
    ("SCAFFOLD", "change"): {("up", "control"), ("down", "control"), ("down", "control_change")},
    ("FedCM", "model"): {("down", "momentum")},
    ("FedCM", "change"): {("down", "momentum"), ("down", "momentum_change")},
}


@pytest.mark.parametrize("mode", ["model", "change"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_kinds_of_messages_follow_from_the_config(algorithm, mode):
    expected = {("up", "update"), ("down", "model"), ("up", "buffers"), ("down", "buffers")}
    expected |= {("up", "scores"), ("up", "growth"), ("down", "mask"), ("down", "mask_change")}
    expected |= {("down", "model_change")} if mode == "change" else set()
    expected |= VECTORS.get((algorithm, mode), set())
    assert table(agree(algorithm, mode)) == expected


@pytest.mark.parametrize("mode", ["model", "change"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_both_ends_write_the_same_bytes_and_read_each_other(algorithm, mode):
    """Random choices, levels and masks come from the config alone."""
    mask = Mask(method="dynamic", density=0.5)
    pruning = Pruning(method="random", density=0.3, mask=mask)
    client, server = (agree(algorithm, mode, pruning) for _ in range(2))

    def pick(gradient, _):
        return client.mask.growth_candidates(gradient, 3)

    for direction, name in sorted(table(client)):
        here, there = client.channel(direction, name), server.channel(direction, name)
        if name.startswith("mask"):
            positions = client.mask.kept
            assert here.encode(positions) == there.encode(positions)
            assert there.decode(here.encode(positions)).tolist() == positions.tolist()
            continue
        some = torch.arange(6.0) if name == "buffers" else vector()
        select = pick if name == "growth" else None
        payload, sent = here.encode(some, 3, 5, select=select)
        assert payload == there.encode(some, 3, 5, select=select)[0]
        assert torch.equal(there.decode(payload, 3, 5).dense(), sent.dense())


def test_kinds_draw_from_streams_of_their_own():
    agreement = agree("SCAFFOLD")
    update, control = (
        agreement.channel("up", name).encode(torch.ones(SIZE), 1, 2)[1].indices
        for name in ("update", "control")
    )
    assert len(update) == len(control) and not np.array_equal(update, control)


def test_a_message_says_what_a_system_without_compression_would_send():
    agreement, dense = agree("SCAFFOLD", "change"), {}
    for direction, name in table(agreement):
        message = agreement.message(direction, name, SERVER, 4, b"12345", 2)
        assert (message.kind, message.sender, message.receiver) == (name, SERVER, 4)
        assert (message.payload, message.num_bytes, message.num_values) == (b"12345", 5, 2)
        dense[name] = message.dense_values
    for name in ("scores", "growth", "mask", "mask_change"):
        assert dense.pop(name) == 0
    assert dense.pop("buffers") == BUFFERS.size and set(dense.values()) == {SIZE}


@pytest.mark.parametrize("how", ["use", "load"])
@pytest.mark.parametrize("mode", ["model", "change"])
@pytest.mark.parametrize("algorithm", ["FedAvg", "SCAFFOLD", "FedCM"])
def test_a_change_of_the_mask_reaches_every_channel(algorithm, mode, how):
    agreement, outside = agree(algorithm, mode), np.setdiff1d(np.arange(SIZE), HALF)
    if how == "use":
        assert agreement.use_mask(HALF).tolist() == outside.tolist()
    else:
        agreement.load_mask({"kept": torch.from_numpy(HALF), "version": 1})
    assert agreement.mask.version == 1 and agreement.mask.kept.tolist() == HALF.tolist()
    for direction, name in table(agreement):
        channel = agreement.channel(direction, name)
        if name in ("scores", "growth"):  # what makes a mask looks at all weights
            assert channel.num_coordinates == SIZE
            assert channel.encode(vector(), 1)[1].dense()[outside].all()
        elif name == "buffers":
            assert channel.num_coordinates == BUFFERS.size
        elif not name.startswith("mask"):
            assert channel.num_coordinates == len(HALF), name
            assert not channel.encode(vector(), 1)[1].dense()[outside].any()


def test_a_second_mask_gives_back_weights_and_says_which_left():
    agreement = agree()
    agreement.use_mask(HALF)
    assert agreement.use_mask(np.arange(10)).tolist() == list(range(10, SIZE, 2))
    channel = agreement.channel("down", "model")
    assert channel.num_coordinates == 10 and channel.encode(vector(), 1)[1].dense()[:10].all()


def test_ends_that_disagree_refuse_each_others_vectors():
    client, server = agree(), agree()
    server.use_mask(HALF)
    payload, _ = client.channel("up", "update").encode(vector(), 1, 2)
    with pytest.raises(PayloadError, match="another layout"):
        server.channel("up", "update").decode(payload, 1, 2)


@pytest.mark.parametrize("policy", ["average", "local", "frozen"])
def test_buffers_travel_only_where_they_are_averaged(policy):
    assert agree(model=Model(norm_policy=policy)).sends_buffers == (policy == "average")
    assert not Agreement(Config(), LAYOUT, Layout((), ())).sends_buffers


def test_settings_that_the_algorithm_does_not_take_are_an_error():
    with pytest.raises(ValueError, match="FedAvg has no setting 'mu'"):
        Agreement(Config(local=Local(options={"mu": 1})), LAYOUT, BUFFERS)
