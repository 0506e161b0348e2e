"""submodel_server.py: count-wise averages against a loop over every coordinate."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.ends import NO_BUFFERS, add, report_of

from config import Config, Downlink, Pruning, Server, Uplink
from federation.agreement import Agreement
from federation.slices import Slice, slice_positions
from federation.submodel_server import SubmodelServer
from layout import Layout

WHOLE = Layout(("a", "b"), ((4, 3), (4,)))
NARROW = {
    1.0: WHOLE,
    0.5: Layout(("a", "b"), ((2, 3), (2,))),
    0.25: Layout(("a", "b"), ((1, 3), (1,))),
}
PLAIN = replace(
    Config(),
    pruning=Pruning(method="none"),
    uplink=Uplink(values="fp32", error_feedback=False),
)
SHARES = [1.0, 0.5, 0.25, 1.0, 0.5, 0.25]
EXAMPLES = [3, 5, 7, 2, 1, 4]


def make(config=PLAIN) -> SubmodelServer:
    slices = {}
    for share, layout in NARROW.items():
        positions = torch.from_numpy(slice_positions(WHOLE, layout)) if share < 1 else None
        slices[share] = Slice(Agreement(config, layout, NO_BUFFERS, WHOLE.size), positions)
    parameters = torch.randn(WHOLE.size, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(0)
    marks = none.bool(), none.bool()
    return SubmodelServer(
        config, slices, SHARES.__getitem__, parameters, none, *marks, list(EXAMPLES)
    )


def updates(cohort, round_number=1):
    """By client, what it learned, in the coordinates of its own network."""
    return {
        client: torch.randn(
            NARROW[SHARES[client]].size,
            generator=torch.Generator().manual_seed(100 * round_number + client),
        )
        for client in cohort
    }


def step(server, learned, round_number=1, failed=()):
    average = server.new_average(list(learned))
    for client, update in learned.items():
        agreement = server.slices[SHARES[client]].agreement
        report = report_of(agreement, client, round_number, update=update)
        if client in failed:
            report.fail("it fell")
        add(average, report, round_number)
    return server.step(average, round_number)


def by_coordinate(learned, before):
    """Each coordinate moves by the weighted mean over the clients that have it."""
    sums, weights = defaultdict(float), defaultdict(int)
    for client, update in learned.items():
        rows = NARROW[SHARES[client]].shapes[0][0]
        places = [3 * row + column for row in range(rows) for column in range(3)]
        places += [12 + row for row in range(rows)]
        for place, value in zip(places, update.tolist(), strict=True):
            sums[place] += EXAMPLES[client] * value
            weights[place] += EXAMPLES[client]
    after = before.tolist()
    for place in sums:
        after[place] += sums[place] / weights[place]
    return after


@pytest.mark.parametrize("cohort", [[0, 1, 2, 3, 4, 5], [1, 2, 4], [2, 5], [0, 3], [0, 2]])
def test_a_coordinate_is_averaged_over_those_who_have_it(cohort):
    server, learned = make(), updates(cohort)
    before = server.parameters.detach().clone()
    assert step(server, learned) == cohort
    expected = by_coordinate(learned, before)
    np.testing.assert_allclose(server.parameters.detach().numpy(), expected, rtol=0, atol=1e-6)


def test_who_failed_counts_nowhere():
    server, learned = make(), updates([0, 1, 2])
    before = server.parameters.detach().clone()
    assert step(server, learned, failed=[0]) == [1, 2]
    del learned[0]
    expected = by_coordinate(learned, before)
    np.testing.assert_allclose(server.parameters.detach().numpy(), expected, rtol=0, atol=1e-6)


def test_weights_that_nobody_has_stay_though_the_optimizer_has_momentum():
    server = make(replace(PLAIN, server=Server(optimizer="FedYogi")))
    step(server, updates([0, 1, 2]))
    before = server.parameters.detach().clone()
    step(server, updates([1, 2], 2), 2)
    moved = (server.parameters.detach() != before).view(-1)
    inside = slice_positions(WHOLE, NARROW[0.5]).tolist()
    assert moved.nonzero().flatten().tolist() == inside
    before = server.parameters.detach().clone()
    assert step(server, updates([1, 2], 3), 3, failed=[1, 2]) == []
    assert torch.equal(server.parameters.detach(), before)


def test_clients_that_are_all_whole_give_the_bits_of_a_plain_server():
    from helpers.ends import make_server

    plain, server = make_server(PLAIN, WHOLE, EXAMPLES), make()
    plain.parameters.data.copy_(server.parameters.data)
    learned = updates([0, 3])
    average = plain.new_average([0, 3])
    for client, update in learned.items():
        add(average, report_of(plain.agreement, client, update=update), 1)
    plain.step(average, 1)
    step(server, learned)
    assert torch.equal(server.parameters, plain.parameters)


@pytest.mark.parametrize("mode", ["model", "change", "copies"])
def test_each_client_receives_the_slice_of_its_width(mode):
    server = make(replace(PLAIN, downlink=Downlink(mode=mode)))
    for round_number in (1, 2):
        broadcast = server.broadcast(round_number, [0, 1, 2])
        for client in (0, 1, 2):
            layout = NARROW[SHARES[client]]
            expected = server.parameters.detach()[slice_positions(WHOLE, layout)]
            begins = broadcast.of(client)
            torch.testing.assert_close(begins.parameters, expected)
            sent = begins.messages[client]
            assert [message.receiver for message in sent] == [client] * len(sent)
            assert sent[-1].dense_values == WHOLE.size and sent[-1].num_values <= layout.size
        server.commit(round_number, [0, 1, 2])
        step(server, updates([0, 1, 2], round_number), round_number)
