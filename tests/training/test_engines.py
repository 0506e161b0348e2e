"""engines.py: optimizers of torch.optim in a client, against a plain torch loop."""

from dataclasses import replace

import pytest
import torch
from helpers.noise import CPU, PICTURES, flat_model, network
from torch.nn.functional import cross_entropy

from config import Local
from distributed import Team
from training.draws import Draws
from training.engines import TorchEngine, num_state_vectors
from training.graph_engine import make_engine
from training.local_sgd import train_client

INDICES = torch.arange(0, 43, 2)  # 22 of them: batches of 8, 8, 6
ADAMW = Local(
    epochs=2,
    batch_size=8,
    lr=0.05,
    optimizer="AdamW",
    optimizer_options={"betas": [0.8, 0.9], "weight_decay": 0.1},
)
OTHERS = {
    "Adam": {"weight_decay": 0.1, "amsgrad": True},
    "Adagrad": {"initial_accumulator_value": 0.1},  # its state is there before the first step
    "RMSprop": {"momentum": 0.9},
    "NAdam": {},
    "Adafactor": {},
    "Rprop": {},
}


def labels(batch: torch.Tensor) -> torch.Tensor:
    return PICTURES.train_batch(batch, None)[1]


def plain_loop(local: Local, lr: float, seed: int, correct=None, name="lenet") -> torch.Tensor:
    """Two epochs of textbook torch: its optimizer as its defaults make it, and nothing of ours."""
    module = network(name)
    cls = getattr(torch.optim, local.optimizer)
    optimizer = cls(module.parameters(), lr=lr, **local.optimizer_options)
    draws = Draws.from_seed(seed, CPU)
    for epoch in range(local.epochs):
        for batch in INDICES[draws.at(epoch).order(len(INDICES))].split(local.batch_size):
            images, labels = PICTURES.train_batch(batch, None)
            module.train().zero_grad()
            cross_entropy(module(images), labels).backward()
            for parameter in module.parameters():
                if correct:
                    correct(parameter.detach(), parameter.grad)
            if local.clip:
                torch.nn.utils.clip_grad_norm_(module.parameters(), local.clip)
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def fit(local: Local, lr: float, seed: int, correct=None, name="lenet", precision="fp32"):
    """One client in a fresh engine; returns its weights and how many steps were skipped."""
    model = flat_model(name)
    engine = TorchEngine(model, local, precision, Team())
    _, skipped = train_client(engine, PICTURES, INDICES, local, lr, seed, correct_gradient=correct)
    return model.read_parameters().clone(), skipped


def pull(weights, gradient):
    """FedProx's towards the origin: it looks at each coordinate alone."""
    gradient.add_(weights, alpha=0.1)


@pytest.mark.parametrize("name", ["lenet", "resnet18"])
@pytest.mark.parametrize("optimizer", ["AdamW", *OTHERS])
def test_a_client_trains_as_a_plain_loop_does(name, optimizer):
    local = replace(ADAMW, optimizer=optimizer)
    if optimizer in OTHERS:
        local = replace(local, optimizer_options=OTHERS[optimizer])
    lr = 0.003  # that of the round, not local.lr
    found, skipped = fit(local, lr, 5, name=name)
    torch.testing.assert_close(found, plain_loop(local, lr, 5, name=name), rtol=0, atol=0)
    assert skipped == 0


@pytest.mark.parametrize("correct", [None, pull])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_the_gradient_is_corrected_and_clipped_before_the_optimizer_sees_it(correct, clip):
    local = replace(ADAMW, clip=clip, optimizer="Adam", optimizer_options={"weight_decay": 0.1})
    found, _ = fit(local, 0.003, 5, correct)
    expected = plain_loop(local, 0.003, 5, correct)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["AdamW", "Adagrad", "RMSprop"])
def test_each_client_begins_with_a_fresh_state(optimizer):
    local = replace(ADAMW, optimizer=optimizer, optimizer_options={})
    model = flat_model()
    engine, start = TorchEngine(model, local, "fp32", Team()), model.parameters.clone()
    ends = []
    for _ in range(2):
        model.parameters.copy_(start)
        train_client(engine, PICTURES, INDICES, local, 0.01, 5)
        ends.append(model.parameters.clone())
        assert not engine.optimizer.state  # nothing is held between clients
    assert torch.equal(*ends)


@pytest.mark.parametrize("optimizer", ["AdamW", "Adagrad", "NAdam"])
def test_a_kept_state_makes_two_rounds_one_of_as_many_epochs(optimizer):
    """Both rounds have the same batches: only what the optimizer keeps tells them apart."""
    local = replace(ADAMW, optimizer=optimizer, optimizer_options={}, optimizer_state="kept")
    local, module = replace(local, epochs=1), network()
    theirs = getattr(torch.optim, optimizer)(module.parameters(), lr=0.01)
    for _ in range(2):
        for batch in INDICES[Draws.from_seed(5, CPU).at(0).order(len(INDICES))].split(8):
            module.zero_grad()
            cross_entropy(module(PICTURES.train_batch(batch, None)[0]), labels(batch)).backward()
            theirs.step()
    model = flat_model()
    engine = TorchEngine(model, local, "fp32", Team())
    train_client(engine, PICTURES, INDICES, local, 0.01, 5)
    given = {key: tensor.clone() for key, tensor in engine.kept.items()}
    train_client(engine, PICTURES, INDICES, local, 0.01, 5)
    expected = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.testing.assert_close(model.read_parameters(), expected, rtol=0, atol=0)
    engine.kept = stored = {key: tensor.clone() for key, tensor in given.items()}
    train_client(engine, PICTURES, INDICES, local, 0.01, 5)
    assert all(torch.equal(stored[key], given[key]) for key in given)  # the store's are only read


def test_fp16_skips_steps_that_overflow_and_moves_like_full_precision_otherwise(monkeypatch):
    expected, _ = fit(ADAMW, 0.003, 5)
    start = flat_model().read_parameters()
    found, skipped = fit(ADAMW, 0.003, 5, precision="fp16")
    assert skipped == 0 and (found - expected).norm() < 0.2 * (expected - start).norm()
    monkeypatch.setattr("training.engines.FIRST_SCALE_POWER", 22)
    found, skipped = fit(replace(ADAMW, epochs=3), 0.003, 5, precision="fp16")
    assert 0 < skipped < 9 and found.isfinite().all()


def test_only_sgd_is_recorded():
    model = flat_model()
    model.device = torch.device("cuda")  # the engine is chosen, and nothing is put there
    assert type(make_engine(model, ADAMW, "fp32", Team())) is TorchEngine


def test_how_many_vectors_an_optimizer_keeps():
    options = {"optimizer_options": {}}
    found = {o: num_state_vectors(replace(ADAMW, optimizer=o, **options)) for o in OTHERS}
    assert found == {
        **{"Adam": 2, "Adagrad": 1, "RMSprop": 1, "NAdam": 2},
        **{"Adafactor": 0, "Rprop": 2},  # Adafactor keeps rows and columns
    }
    assert num_state_vectors(Local(momentum=0.9)) == 1
    assert num_state_vectors(Local(momentum=0.0)) == 0
