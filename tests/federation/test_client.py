"""The clients' end of a round."""

import torch
from helpers.runs import make_federation


def test_error_feedback_conserves_what_clients_learned(tmp_path):
    """What the server gets plus what is still owed is what was learned, to the last bit."""
    one = make_federation(tmp_path, "clients.total=1", "clients.per_round=1")
    received = one.server.parameters.detach().clone()
    [trained] = one.clients.train([0], 1, one.server.broadcast(1, [0]))
    learned = one.model.read_parameters() - received
    [message] = one.clients.encode(trained, 1).messages
    sent = one.server.agreement.channel("up", "update").decode(message.payload, 1, 0).dense()
    residual = one.clients.store.get_staged(0)["residual"]
    assert torch.equal(sent + residual, learned)
    assert 0 < message.num_values < 0.06 * len(learned)
