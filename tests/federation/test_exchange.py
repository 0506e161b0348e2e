"""exchange.py: every rank gets every client's report in client order, or the sums of all."""

from dataclasses import replace

import pytest
import torch
from helpers.ends import add, report_of
from helpers.ranks import on_ranks

from config import Config, Pruning, Uplink
from federation.agreement import Agreement
from federation.exchange import Exchange
from federation.messages import Report
from federation.phases import Phases
from federation.server import Average
from layout import Layout
from training.local_sgd import Interrupted

LAYOUT, BUFFERS = (
    Layout(("w", "b"), ((6, 5), (10,))),
    Layout(("mean", "var", "steps"), ((), (), ())),
)
EXACT = Uplink(values="fp32", error_feedback=False)
AGREEMENT = Agreement(Config(pruning=Pruning(method="none"), uplink=EXACT), LAYOUT, BUFFERS)
WEIGHTS = {0: 1, 2: 20, 3: 3, 5: 11, 7: 4}
COHORT = list(WEIGHTS)
RANK_OF = {0: 1, 2: 0, 3: 2, 5: 0, 7: 1}  # of four ranks: the last one has no client


def update_of(client: int) -> torch.Tensor:
    return torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(client))


def buffers_of(client: int) -> torch.Tensor:
    return torch.tensor([-client, client, 100 - client], dtype=torch.float32)


def report(client: int) -> Report:
    return report_of(AGREEMENT, client, update=update_of(client), buffers=buffers_of(client))


def own_reports(rank: int, wounded: int | None = None):
    for client in COHORT:
        if RANK_OF[client] == rank:
            own = report(client)
            if client == wounded:
                payload = bytes(own.messages[0].payload)[:-1]
                own.messages[0] = replace(own.messages[0], payload=payload, num_bytes=len(payload))
            yield own


# --- reports --------------------------------------------------------------------------------------


def test_every_rank_gets_all_reports_in_client_order():
    def work(ranks):
        arrived = Exchange(ranks, sums=False, phases=Phases()).gather(own_reports(ranks.rank))
        for one in arrived:
            one.messages = [replace(m, payload=bytes(m.payload)) for m in one.messages]
        return arrived

    expected = [report(client) for client in COHORT]
    for arrived in on_ranks(4, work):
        assert arrived == expected


def test_with_sums_payloads_stay_on_the_rank_that_made_them():
    def work(ranks):
        return Exchange(ranks, sums=True, phases=Phases()).gather(own_reports(ranks.rank))

    for rank, arrived in enumerate(on_ranks(4, work)):
        for client, one in zip(COHORT, arrived, strict=True):
            sent = report(client)
            assert one == (sent if RANK_OF[client] == rank else sent.without_payloads())


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("size", [1, 4])
def test_a_rank_that_is_asked_to_stop_stops_all(size, sums):
    def stops():
        yield report(COHORT[0])
        raise Interrupted

    def work(ranks):
        own = stops() if ranks.rank == 0 else own_reports(ranks.rank)
        return Exchange(ranks, sums, Phases()).gather(own)

    assert [type(result) for result in on_ranks(size, work)] == [Interrupted] * size


# --- sums -----------------------------------------------------------------------------------------


def average_on(ranks, sums: bool, wounded: int | None = None) -> Average:
    """What a rank knows of a round once all reports are in."""
    is_counter, is_variance = torch.tensor([0, 0, 1]).bool(), torch.tensor([0, 1, 0]).bool()
    average = Average(AGREEMENT, WEIGHTS, is_counter, is_variance, with_norms=True)
    exchange = Exchange(ranks, sums, Phases())
    for arrived in exchange.gather(own_reports(ranks.rank, wounded)):
        add(average, arrived, 1)
    exchange.add_up(average)
    return average


@pytest.mark.parametrize("wounded", [None, 5])
@pytest.mark.parametrize("sums", [False, True])
def test_all_ranks_have_the_average_of_all_clients(sums, wounded):
    def work(ranks):
        average = average_on(ranks, sums, wounded)
        return average.finish(), [one.failure for one in average.reports]

    present = [client for client in COHORT if client != wounded]
    total = sum(WEIGHTS[client] for client in present)
    updates = sum(WEIGHTS[c] * update_of(c).double() for c in present) / total
    norms = sum(WEIGHTS[c] * float(update_of(c).double().square().sum()) for c in present) / total
    buffers = sum(WEIGHTS[c] * buffers_of(c).double() for c in present) / total
    buffers[2] = 100  # the largest counter: that of client 0
    results = on_ranks(4, work)
    for averages, failures in results:
        assert averages.keys() == {"update", "buffers", "squared_norm"}
        torch.testing.assert_close(averages["update"].double(), updates, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(averages["buffers"].double(), buffers, rtol=1e-5, atol=1e-6)
        assert float(averages["squared_norm"]) == pytest.approx(norms, rel=1e-5)
        assert [bool(failure) for failure in failures] == [c == wounded for c in COHORT]
        for kind, vector in averages.items():  # ranks never differ, not by a bit
            assert torch.equal(vector, results[0][0][kind])
