"""local_sgd.py: local training against a plain torch loop."""

import math
from dataclasses import replace
from itertools import count

import pytest
import torch
from helpers.noise import CPU, PICTURES, flat_model, network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from cnn_model import Dropout
from config import Local, LrSchedule
from distributed import Team
from training.draws import Draws
from training.engines import TorchEngine
from training.evaluation import evaluate
from training.local_sgd import (
    Interrupted,
    batch_sizes,
    local_lr,
    loss_gradient,
    train_client,
)

PLAIN = Local(epochs=1, batch_size=8, lr=0.1, momentum=0.0, weight_decay=0.0)
FOUR_BATCHES = replace(PLAIN, steps=4)


# --- schedules and batches ------------------------------------------------------------------------


def rates(schedule: LrSchedule, rounds: int) -> list[float]:
    return [local_lr(Local(lr=0.4, lr_schedule=schedule), r, rounds) for r in range(1, rounds + 1)]


def test_local_lr_by_hand():
    assert rates(LrSchedule(), 3) == [0.4, 0.4, 0.4]
    assert rates(LrSchedule(name="exponential", gamma=0.5), 4) == [0.4, 0.2, 0.1, 0.05]
    # a milestone m counts completed rounds, as in torch: round m + 1 is the first at the lower rate
    step = rates(LrSchedule(name="step", gamma=0.5, milestones=[1, 3]), 5)
    assert step == [0.4, 0.2, 0.2, 0.1, 0.1]
    half = 0.5 * math.sqrt(0.5)
    expected = [0.4, 0.4 * (0.5 + half), 0.2, 0.4 * (0.5 - half)]
    assert rates(LrSchedule(name="cosine"), 4) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        (LrSchedule(name="cosine"), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=20)),
        (LrSchedule(name="exponential", gamma=0.9), lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
        (
            LrSchedule(name="step", gamma=0.2, milestones=[5, 6, 15]),
            lambda o: lr_scheduler.MultiStepLR(o, [5, 6, 15], 0.2),
        ),
    ],
)
def test_local_lr_is_that_of_torchs_schedulers(schedule, theirs):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler, expected = theirs(optimizer), []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(schedule, 20) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "expected"),
    [
        (10, 5, [5, 5]),
        (10, 4, [4, 4, 2]),
        (9, 4, [4, 5]),  # the ninth joins the batch before it
        (5, 4, [5]),
        (4, 4, [4]),
        (3, 4, [3]),
        (3, 2, [3]),
        (1, 4, [1]),  # unavoidable
        (3, 1, [1, 1, 1]),  # asked for
        (0, 4, []),
    ],
)
def test_the_batches_of_an_epoch_by_hand(num_examples, batch_size, expected):
    assert batch_sizes(Local(epochs=1, batch_size=batch_size), num_examples) == expected
    assert batch_sizes(Local(epochs=2, batch_size=batch_size), num_examples) == 2 * expected


def test_steps_run_on_into_further_epochs():
    assert batch_sizes(Local(epochs=5, batch_size=4, steps=2), 10) == [4, 4]
    assert batch_sizes(Local(epochs=5, batch_size=4, steps=7), 10) == [4, 4, 2, 4, 4, 2, 4]
    assert batch_sizes(Local(batch_size=4, steps=3), 9) == [4, 5, 4]
    assert batch_sizes(Local(batch_size=64, steps=3), 5) == [5, 5, 5]
    assert batch_sizes(Local(batch_size=4, steps=3), 0) == []  # not an endless wait


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 100))
def test_the_batches_of_an_epoch_hold_everything_once(num_examples, batch_size):
    sizes = batch_sizes(Local(epochs=1, batch_size=batch_size), num_examples)
    assert sum(sizes) == num_examples
    assert all(size == batch_size for size in sizes[:-1])
    assert 1 <= sizes[-1] <= batch_size + 1
    assert 1 not in sizes or batch_size == 1 or num_examples == 1


@pytest.mark.parametrize("changes", [{}, dict(epochs=2), dict(steps=8), dict(batch_size=7)])
def test_the_schedule_is_the_one_that_is_trained(changes):
    """The clock and the placement of clients count with batch_sizes(); training must agree."""
    local, trained = replace(PLAIN, **changes), []
    engine = TorchEngine(flat_model(), local, "fp32", Team())
    forward = engine.forward
    engine.forward = lambda images: trained.append(len(images)) or forward(images)
    train_client(engine, PICTURES, INDICES, local, 0.1, seed=3)
    assert trained == batch_sizes(local, len(INDICES))


# --- training -----------------------------------------------------------------------------------


INDICES = torch.arange(0, 43, 2)  # 22 of them: batches of 8, 8, 6


def fit(name: str = "lenet", local: Local = PLAIN, seed: int = 3, **more):
    """Train a fresh model; return it and its mean loss."""
    model = flat_model(name)
    settings = dict(lr=local.lr, precision="fp32", indices=INDICES, seed=seed) | more
    loss, num_skipped = run(model, local, **settings)
    assert num_skipped == 0
    return model, float(loss)


def run(model, local, lr, precision="fp32", seed=3, indices=INDICES, pictures=None, **more):
    engine = TorchEngine(model, local, precision, Team())
    return train_client(engine, pictures or PICTURES, indices, local, lr, seed, **more)


def plain_loop(module: nn.Module, local: Local, lr: float, seed: int, indices=INDICES) -> float:
    """The same training in textbook torch: no flat vector, no fused step, no scaler.

    The decay is a part of the gradient, as of a loss with an L2 term: it comes before the clipping.
    """
    sgd = torch.optim.SGD(
        module.parameters(),
        lr=lr,
        momentum=local.momentum,
        nesterov=local.nesterov,
        fused=False,
        foreach=False,
    )
    losses = []
    for epoch in count():
        order = indices[Draws.from_seed(seed, CPU).at(epoch).order(len(indices))]
        batches = list(order.split(local.batch_size))
        if len(batches[-1]) == 1 and len(batches) > 1:
            batches[-2:] = [torch.cat(batches[-2:])]
        for batch in batches:
            if len(losses) == (local.steps or local.epochs * len(batches)):
                return sum(losses) / len(losses)
            images, labels = PICTURES.train_batch(batch, None)
            module.train().zero_grad()
            loss = cross_entropy(module(images), labels)
            loss.backward()
            for parameter in module.parameters():
                parameter.grad.add_(parameter.detach(), alpha=local.weight_decay)
            if local.clip:
                torch.nn.utils.clip_grad_norm_(module.parameters(), local.clip)
            sgd.step()
            losses.append(loss.item())


@pytest.mark.parametrize("name", ["lenet", "resnet18"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(epochs=3),
        dict(steps=7),  # two epochs and one batch
        dict(steps=2),
        dict(momentum=0.9, epochs=2),
        dict(momentum=0.9, nesterov=True, epochs=2),
        dict(weight_decay=0.1),
        dict(clip=0.05),
        dict(clip=1e6),
        dict(momentum=0.5, weight_decay=0.01, clip=0.5, epochs=2),
        dict(batch_size=7),  # 22 = 7 + 7 + 8
        dict(batch_size=100),
    ],
)
def test_training_equals_a_plain_loop(name, changes):
    local, module = replace(PLAIN, **changes), network(name)
    lr = 0.07  # that of the round, not local.lr
    seed = 5  # one of the many at which no ReLU is so near 0 that rounding switches it
    expected_loss = plain_loop(module, local, lr, seed)
    model, loss = fit(name, local, seed, lr=lr)
    expected = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.testing.assert_close(model.read_parameters(), expected, rtol=1e-5, atol=1e-6)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    buffers = [b.flatten().float() for b in module.buffers()]
    if buffers:
        torch.testing.assert_close(model.read_buffers(), torch.cat(buffers), rtol=1e-4, atol=1e-6)


def test_the_loss_stays_on_the_device_and_no_step_is_skipped_without_fp16():
    loss, num_skipped = run(flat_model(), PLAIN, 0.1)
    assert loss.shape == () and isinstance(loss, torch.Tensor)
    assert type(num_skipped) is int and num_skipped == 0


def test_clipping_does_something():
    free, clipped = fit()[0], fit(local=replace(PLAIN, clip=0.05))[0]
    start = flat_model().parameters
    assert (clipped.parameters - start).norm() <= 3 * 0.1 * 0.05 * 1.0001  # three steps
    assert (free.parameters - start).norm() > 3 * 0.1 * 0.05


@pytest.mark.parametrize("name", ["lenet", "cnn", "resnet18"])  # cnn has dropout
def test_the_result_depends_on_the_seed_and_not_on_what_happened_before(name):
    torch.manual_seed(98)
    first, first_loss = fit(name, seed=3)
    other, _ = fit(name, seed=4)
    assert not torch.equal(first.parameters, other.parameters)

    torch.manual_seed(99)
    other.parameters.copy_(flat_model(name).parameters)  # as a rank does
    other.buffers.copy_(flat_model(name).buffers)
    other.network.eval()  # as evaluate() leaves it
    again, _ = run(other, PLAIN, PLAIN.lr)
    assert torch.equal(other.parameters, first.parameters) and again == first_loss
    assert torch.equal(other.buffers, first.buffers)


@pytest.mark.parametrize("name", ["cnn", "lenet"])
def test_nothing_is_drawn_from_the_global_generator(name):
    before = torch.get_rng_state()
    fit(name)
    assert torch.equal(torch.get_rng_state(), before)


def test_gaps_between_tensors_stay_zero():
    """Nothing that is done to the whole vector may find numbers there."""
    local = replace(PLAIN, momentum=0.9, nesterov=True, weight_decay=0.01, clip=0.5, epochs=3)
    model = flat_model("lenet")
    start = model.parameters.clone()

    def pull(x, gradient):
        gradient.add_(x, alpha=0.1).sub_(start, alpha=0.1)

    run(model, local, 0.1, correct_gradient=pull)
    is_gap = ~model.aligned(torch.ones(model.layout.size, dtype=torch.bool))
    assert is_gap.any() and not model.parameters[is_gap].any()
    assert not model.gradients[is_gap].any()
    assert not loss_gradient(model, PICTURES, INDICES, PLAIN, seed=3)[is_gap].any()


class FakeTeam(Team):
    """One rank of a team whose other ranks have gradients of zero."""

    def sum_(self, tensor):
        pass


def dropout_masks(team: Team, batch_size: int) -> list[torch.Tensor]:
    """Which entries a rank's first dropout layer keeps, for each of three batches."""
    model, masks = flat_model("cnn"), []
    layer = next(module for module in model.network.modules() if isinstance(module, Dropout))
    layer.register_forward_pre_hook(lambda _, inputs: (0 * inputs[0] + 1,))
    layer.register_forward_hook(lambda *call: masks.append(call[-1] != 0))
    local = replace(PLAIN, batch_size=batch_size, steps=3)
    train_client(TorchEngine(model, local, "fp32", team), PICTURES, INDICES, local, 0.1, seed=3)
    return masks


def test_each_rank_of_a_team_draws_dropout_masks_of_its_own():
    first, second, again = (dropout_masks(FakeTeam(rank, 2), 6) for rank in (0, 1, 1))
    for one, two, same in zip(first, second, again, strict=True):
        assert torch.equal(two, same)
        agreement = float((one == two).float().mean())  # 0.25 of the entries are dropped
        expected = 0.25**2 + 0.75**2
        assert agreement == pytest.approx(expected, abs=6 * (0.25 / one.numel()) ** 0.5)
    alone = dropout_masks(Team(), 3)  # the pictures that a rank sees of a batch of 6
    assert all(torch.equal(a, b) for a, b in zip(alone, first, strict=True))


def two_epochs() -> list[torch.Tensor]:
    """The batches that the client with the seed 3 trains."""
    draws = Draws.from_seed(3, CPU)
    return [b for epoch in range(2) for b in INDICES[draws.at(epoch).order(22)].split(8)]


def test_each_epoch_is_shuffled_anew_and_each_step_draws_anew():
    batches, keys = [], []

    class Recorder:
        def train_batch(self, indices, draws):
            batches.append(indices.tolist())
            keys.append(int(draws.key))
            return PICTURES.train_batch(indices, draws)

    run(flat_model("cnn"), replace(PLAIN, epochs=2), 0.1, pictures=Recorder())
    assert batches == [batch.tolist() for batch in two_epochs()]
    assert batches[:3] != batches[3:] and len(set(keys)) == 6


def test_dropout_is_on_in_training_and_off_in_evaluation():
    model, loss = fit("cnn", replace(PLAIN, batch_size=100), lr=1e-9)
    _, total = evaluate(flat_model("cnn"), PICTURES, "fp32", "test", 0, 17)
    assert model.network.training
    with torch.no_grad():
        images, labels = PICTURES.train_batch(INDICES, None)
        assert loss != pytest.approx(float(cross_entropy(model.network.eval()(images), labels)))
    again = evaluate(flat_model("cnn"), PICTURES, "fp32", "test", 0, 17)
    assert again[1] == total and not model.network.training


@pytest.mark.parametrize("after", [0, 1, 2])
def test_stop_is_asked_before_each_batch(after):
    answers = iter([False] * after + [True])
    model, expected = flat_model(), flat_model()
    with pytest.raises(Interrupted):
        run(model, PLAIN, 0.1, stop=lambda: next(answers))
    if after:
        run(expected, replace(PLAIN, steps=after), 0.1)
    assert torch.equal(model.parameters, expected.parameters)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_gradients_of_an_earlier_client_do_not_leak(clip):
    local, model = replace(PLAIN, clip=clip), flat_model()
    model.gradients.fill_(float("nan"))  # in the gaps, too
    run(model, local, PLAIN.lr)
    assert torch.equal(model.parameters, fit(local=local)[0].parameters)


def test_a_gradient_that_overflows_does_not_spread_to_the_next_step(monkeypatch):
    """fp16 skips the step, but clipping has multiplied by a norm of inf or NaN."""
    monkeypatch.setattr("training.engines.FIRST_SCALE_POWER", 22)
    model = flat_model()
    _, num_skipped = run(model, replace(PLAIN, clip=0.5, epochs=3), 0.1, "fp16")
    assert 0 < num_skipped < 9 and model.read_parameters().isfinite().all()
    assert torch.equal(model.parameters, model.aligned(model.read_parameters()))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("changes", [{}, dict(clip=0.05)])
def test_half_precision_is_near_full_precision(precision, changes):
    local = replace(PLAIN, **changes)
    model, loss = fit(local=local, precision=precision)
    full, full_loss = fit(local=local)
    start = flat_model().parameters
    assert loss == pytest.approx(full_loss, rel=0.02) and loss != full_loss
    moved, expected = model.parameters - start, full.parameters - start
    assert (moved - expected).norm() < 0.1 * expected.norm()


def test_fp16_keeps_small_gradients_by_scaling_the_loss():
    zeros = INDICES[PICTURES.train_labels[INDICES] == 0]
    gradients = {}
    for precision in ("fp32", "fp16"):
        model = flat_model()
        model.views(model.parameters)[-1][0] = 14.0  # nearly certain, and right
        # a clip, so that the engine gathers the gradient
        run(model, replace(PLAIN, steps=1, clip=1e6), 1.0, precision, indices=zeros)
        gradients[precision] = model.gradients
    exact = gradients["fp32"]
    assert 0 < exact.norm() < 1e-4
    assert (gradients["fp16"] - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("name", ["lenet", "resnet18"])
def test_the_step_is_the_same_whether_the_gradient_is_gathered_or_not(name):
    """Gradients of convolutions come with channels last, which fused SGD would not notice."""
    local = replace(PLAIN, momentum=0.9, nesterov=True, weight_decay=0.01)
    fresh, gathered = flat_model(name), flat_model(name)
    run(fresh, local, 0.05)
    run(gathered, replace(local, clip=1e6), 0.05)
    assert torch.equal(fresh.parameters, gathered.parameters)
    for tensor, view in zip(fresh.network.parameters(), fresh.views(fresh.gradients), strict=True):
        assert tensor.grad.data_ptr() == view.data_ptr()  # as it was before


def test_a_client_of_one_example():
    model, loss = fit(indices=torch.tensor([5]))
    module = network()
    expected = plain_loop(module, PLAIN, PLAIN.lr, 3, torch.tensor([5]))
    assert loss == pytest.approx(expected, rel=1e-6)


# --- masks ----------------------------------------------------------------------------------------


def test_pruned_weights_stay_zero_and_have_no_part_in_clipping():
    local = replace(PLAIN, momentum=0.9, weight_decay=0.01, clip=1e-3, epochs=2)
    model = flat_model()
    generator = torch.Generator().manual_seed(5)
    pruned = model.aligned(torch.rand(model.layout.size, generator=generator) < 0.3)
    model.parameters.masked_fill_(pruned, 0.0)
    start = model.parameters.clone()

    def keep_zero(x, gradient):
        gradient.masked_fill_(pruned, 0.0)

    run(model, replace(local, steps=1), 0.1, correct_gradient=keep_zero)
    assert not model.parameters[pruned].any()
    moved = model.parameters - start
    assert float(moved.norm()) == pytest.approx(0.1 * 1e-3, rel=1e-2)  # clipped on the mask alone
    run(model, local, 0.1, seed=4, correct_gradient=keep_zero)
    assert not model.parameters[pruned].any() and model.parameters[~pruned].any()


@pytest.mark.parametrize("name", ["lenet", "resnet18", "cnn"])
def test_the_loss_gradient_is_that_of_autograd_and_leaves_nothing_behind(name):
    model = flat_model(name)
    before = [model.parameters.clone(), model.buffers.clone(), torch.random.get_rng_state()]
    gradient = loss_gradient(model, PICTURES, INDICES, FOUR_BATCHES, seed=3)
    after = [model.parameters, model.buffers, torch.random.get_rng_state()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    again = loss_gradient(model, PICTURES, INDICES, FOUR_BATCHES, seed=3)
    assert torch.equal(gradient, again)
    if name == "cnn":  # dropout: nothing to compare with
        return
    module = network(name).train()
    batches = two_epochs()[:4]
    for batch in batches:
        images, labels = PICTURES.train_batch(batch, None)
        cross_entropy(module(images), labels, reduction="sum").backward()
    expected = torch.cat([p.grad.flatten() for p in module.parameters()]) / (8 + 8 + 6 + 8)
    torch.testing.assert_close(model.compact(gradient), expected, rtol=1e-4, atol=1e-6)


def test_a_loss_gradient_can_be_interrupted():
    with pytest.raises(Interrupted):
        loss_gradient(flat_model(), PICTURES, INDICES, FOUR_BATCHES, 3, lambda: True)


def test_momentum_is_sound_where_the_first_step_overflows(monkeypatch):
    """fp16: torch's fused SGD would go on from uninitialised memory."""
    monkeypatch.setattr("training.engines.FIRST_SCALE_POWER", 22)
    model = flat_model()
    junk = torch.full_like(model.parameters, 1e30)  # what freed memory may hold
    del junk
    _, num_skipped = run(model, replace(PLAIN, momentum=0.9, epochs=3), 0.1, "fp16")
    assert model.parameters.abs().max() < 10 and 0 < num_skipped < 9


def test_a_correction_is_applied_to_unscaled_gradients_before_clipping():
    """A correction of 3 in one weight, with everything else zeroed: clipped to 1, in fp16 too."""
    for precision in ("fp32", "fp16"):
        model = flat_model()
        start = model.parameters.clone()

        def correct(x, gradient):
            gradient.zero_()
            gradient[5] = 3.0

        run(model, replace(PLAIN, steps=1, clip=1.0), 0.5, precision, correct_gradient=correct)
        moved = model.parameters - start
        assert moved[5] == pytest.approx(-0.5, rel=1e-5) and moved.count_nonzero() == 1
