"""Servers without a network, and what they and their clients say to each other."""

import torch

from config import Config
from federation.agreement import Agreement
from federation.messages import SERVER, Message, Report
from federation.server import Average, Server
from layout import Layout

NO_BUFFERS = Layout((), ())


def make_server(config: Config, layout: Layout, num_examples=(1,) * 8, seed=0) -> Server:
    """A server of a model without norm layers, whose weights are random."""
    parameters = torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
    none = torch.zeros(0)
    return Server(
        config,
        Agreement(config, layout, NO_BUFFERS),
        parameters,
        none,
        none.bool(),
        none.bool(),
        list(num_examples),
    )


def add(average: Average, report: Report, round_number: int) -> None:
    """Decode a report and add it, as a schedule does."""
    average.add(report, average.decode(report, round_number))


def report_of(agreement: Agreement, client: int, round_number: int = 1, **vectors) -> Report:
    """What a client reports that sends these vectors, by kind of message."""

    def pick(vector, _):
        return agreement.mask.growth_candidates(vector, round_number)

    report = Report(client, num_examples=1, step_length=1.0)
    for kind, vector in vectors.items():
        channel, select = agreement.channel("up", kind), pick if kind == "growth" else None
        payload, sent = channel.encode(vector, round_number, client, select=select)
        report.messages.append(
            agreement.message("up", kind, client, SERVER, payload, len(sent.values))
        )
    return report


def mask_messages(server: Server, round_number: int, cohort: list[int]) -> dict[int, list[Message]]:
    """What the server tells each client about the mask."""
    messages = server.broadcast(round_number, cohort).messages
    return {
        client: [message for message in some if message.kind.startswith("mask")]
        for client, some in messages.items()
    }
