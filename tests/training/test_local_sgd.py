"""client.py: local training against a plain torch loop."""

import copy
import math
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from cnn_model import FlatModel, build_network
from config import Local, Schedule
from data import Pictures
from data.datasets import Dataset
from distributed import Team
from training import local_sgd as client
from training.engines import TorchEngine
from training.local_sgd import (
    Interrupted,
    batch_bounds,
    choose_precision,
    evaluate,
    local_lr,
    loss_gradient,
    num_steps,
    train,
)

CPU = torch.device("cpu")
PLAIN = Local(epochs=1, batch_size=8, lr=0.1, momentum=0.0, weight_decay=0.0)


# --- schedules and batches ------------------------------------------------------------------------


def rates(schedule: Schedule, rounds: int) -> list[float]:
    return [local_lr(Local(lr=0.4, lr_schedule=schedule), r, rounds) for r in range(1, rounds + 1)]


def test_local_lr_by_hand():
    assert rates(Schedule(), 3) == [0.4, 0.4, 0.4]
    assert rates(Schedule(name="exponential", gamma=0.5), 4) == [0.4, 0.2, 0.1, 0.05]
    # a milestone m counts completed rounds, as in torch: round m + 1 is the first at the lower rate
    step = rates(Schedule(name="step", gamma=0.5, milestones=[1, 3]), 5)
    assert step == [0.4, 0.2, 0.2, 0.1, 0.1]
    half = 0.5 * math.sqrt(0.5)
    expected = [0.4, 0.4 * (0.5 + half), 0.2, 0.4 * (0.5 - half)]
    assert rates(Schedule(name="cosine"), 4) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        (Schedule(name="cosine"), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=20)),
        (Schedule(name="exponential", gamma=0.9), lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
        (
            Schedule(name="step", gamma=0.2, milestones=[5, 6, 15]),
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
        (10, 5, [0, 5, 10]),
        (10, 4, [0, 4, 8, 10]),
        (9, 4, [0, 4, 9]),  # the ninth joins the batch before it
        (5, 4, [0, 5]),
        (4, 4, [0, 4]),
        (3, 4, [0, 3]),
        (3, 2, [0, 3]),
        (1, 4, [0, 1]),  # unavoidable
        (3, 1, [0, 1, 2, 3]),  # asked for
    ],
)
def test_batch_bounds_by_hand(num_examples, batch_size, expected):
    assert batch_bounds(num_examples, batch_size) == expected


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 100))
def test_batch_bounds_cover_everything_once(num_examples, batch_size):
    bounds = batch_bounds(num_examples, batch_size)
    sizes = [stop - start for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    assert bounds[0] == 0 and bounds[-1] == num_examples
    assert all(size == batch_size for size in sizes[:-1])
    assert 1 <= sizes[-1] <= batch_size + 1
    assert 1 not in sizes or batch_size == 1 or num_examples == 1


def test_num_steps():
    assert num_steps(Local(epochs=1, batch_size=4), 10) == 3
    assert num_steps(Local(epochs=5, batch_size=4), 9) == 10
    assert num_steps(Local(epochs=5, batch_size=4, steps=7), 9) == 7


# --- training -----------------------------------------------------------------------------------


def make_pictures(num_train: int = 43, num_test: int = 17) -> Pictures:
    """Three classes of 8x8 noise; no augmentation."""
    generator = torch.Generator().manual_seed(0)

    def noise(count):
        images = torch.randint(256, (count, 8, 8, 3), generator=generator, dtype=torch.uint8)
        return images, torch.randint(3, (count,), generator=generator)

    fields = (*noise(num_train), *noise(num_test), ("a", "b", "c"), "0" * 64)
    return Pictures(Dataset("noise", *fields), CPU, padding=0, flip=False)


PICTURES = make_pictures()
INDICES = torch.arange(0, 43, 2)  # 22 of them: batches of 8, 8, 6


def network(name: str = "lenet", seed: int = 0) -> nn.Module:
    return build_network(name, 3, (8, 8), seed, width=0.125)


def fit(name: str = "lenet", local: Local = PLAIN, seed: int = 3, **more):
    """Train a fresh model; return it and its mean loss."""
    model = FlatModel(network(name), CPU)
    settings = dict(lr=local.lr, precision="fp32", indices=INDICES, seed=seed) | more
    loss, num_skipped = run(model, local, **settings)
    assert num_skipped == 0
    return model, loss


def run(model, local, lr, precision="fp32", seed=3, indices=INDICES, pictures=None, **more):
    engine = TorchEngine(model, local, precision, Team())
    return train(engine, pictures or PICTURES, indices, local, lr, seed, **more)


def plain_loop(module: nn.Module, local: Local, lr: float, seed: int, indices=INDICES) -> float:
    """The same training in textbook torch: no flat vector, no fused step, no scaler."""
    sgd = torch.optim.SGD(
        module.parameters(),
        lr=lr,
        momentum=local.momentum,
        weight_decay=local.weight_decay,
        nesterov=local.nesterov,
        fused=False,
        foreach=False,
    )
    generator, losses = torch.Generator().manual_seed(seed), []
    while True:
        order = indices[torch.randperm(len(indices), generator=generator)]
        batches = list(order.split(local.batch_size))
        if len(batches[-1]) == 1 and len(batches) > 1:
            batches[-2:] = [torch.cat(batches[-2:])]
        for batch in batches:
            if len(losses) == (local.steps or local.epochs * len(batches)):
                return sum(losses) / len(losses)
            images, labels = PICTURES.train_batch(batch, torch.Generator())
            module.train().zero_grad()
            loss = cross_entropy(module(images), labels)
            loss.backward()
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
    torch.testing.assert_close(model.parameters, expected, rtol=1e-5, atol=1e-6)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert isinstance(loss, float)
    buffers = [b.flatten().float() for b in module.buffers()]
    if buffers:
        torch.testing.assert_close(model.buffers, torch.cat(buffers), rtol=1e-4, atol=1e-6)


def test_clipping_does_something():
    free, clipped = fit()[0], fit(local=replace(PLAIN, clip=0.05))[0]
    start = FlatModel(network(), CPU).parameters
    assert (clipped.parameters - start).norm() <= 3 * 0.1 * 0.05 * 1.0001  # three steps
    assert (free.parameters - start).norm() > 3 * 0.1 * 0.05


@pytest.mark.parametrize("name", ["lenet", "cnn", "resnet18"])  # cnn has dropout
def test_the_result_depends_on_the_seed_and_not_on_what_happened_before(name):
    torch.manual_seed(98)
    first, first_loss = fit(name, seed=3)
    other, _ = fit(name, seed=4)
    assert not torch.equal(first.parameters, other.parameters)

    torch.manual_seed(99)
    other.parameters.copy_(FlatModel(network(name), CPU).parameters)  # as a rank does
    other.buffers.copy_(FlatModel(network(name), CPU).buffers)
    other.network.eval()  # as evaluate() leaves it
    again, _ = run(other, PLAIN, PLAIN.lr)
    assert torch.equal(other.parameters, first.parameters) and again == first_loss
    assert torch.equal(other.buffers, first.buffers)


@pytest.mark.parametrize("name", ["cnn", "lenet"])
@pytest.mark.parametrize("stop", [lambda: False, lambda: True])
def test_the_global_random_state_is_left_as_it_was(name, stop):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    try:
        fit(name, stop=stop)
    except Interrupted:
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_shuffles_come_from_the_clients_own_generator():
    """Dropout draws between two epochs must not change which batches the second one has."""
    batches = []

    class Recorder:
        def train_batch(self, indices, generator):
            batches.append(indices)
            return PICTURES.train_batch(indices, generator)

    model = FlatModel(network("cnn"), CPU)
    run(model, replace(PLAIN, epochs=2), 0.1, pictures=Recorder())
    generator = torch.Generator().manual_seed(3)
    orders = [INDICES[torch.randperm(22, generator=generator)] for _ in range(2)]
    expected = [batch for order in orders for batch in order.split(8)]
    assert [b.tolist() for b in batches] == [b.tolist() for b in expected]


def test_dropout_is_on_in_training_and_off_in_evaluation():
    model, loss = fit("cnn", replace(PLAIN, batch_size=100), lr=1e-9)
    _, total = evaluate(FlatModel(network("cnn"), CPU), PICTURES, "fp32", "test", 0, 17)
    assert model.network.training
    with torch.no_grad():
        images, labels = PICTURES.train_batch(INDICES, torch.Generator())
        assert loss != pytest.approx(float(cross_entropy(model.network.eval()(images), labels)))
    again = evaluate(FlatModel(network("cnn"), CPU), PICTURES, "fp32", "test", 0, 17)
    assert again[1] == total and not model.network.training


@pytest.mark.parametrize("after", [0, 1, 2])
def test_stop_is_asked_before_each_batch(after):
    answers = iter([False] * after + [True])
    model, expected = FlatModel(network(), CPU), FlatModel(network(), CPU)
    with pytest.raises(Interrupted):
        run(model, PLAIN, 0.1, stop=lambda: next(answers))
    if after:
        run(expected, replace(PLAIN, steps=after), 0.1)
    assert torch.equal(model.parameters, expected.parameters)


def test_gradients_of_an_earlier_client_do_not_leak():
    model = FlatModel(network(), CPU)
    model.gradients.fill_(1e3)
    run(model, PLAIN, PLAIN.lr)
    assert torch.equal(model.parameters, fit()[0].parameters)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("changes", [{}, dict(clip=0.05)])
def test_half_precision_is_near_full_precision(precision, changes):
    local = replace(PLAIN, **changes)
    model, loss = fit(local=local, precision=precision)
    full, full_loss = fit(local=local)
    start = FlatModel(network(), CPU).parameters
    assert loss == pytest.approx(full_loss, rel=0.02) and loss != full_loss
    moved, expected = model.parameters - start, full.parameters - start
    assert (moved - expected).norm() < 0.1 * expected.norm()


def test_fp16_keeps_small_gradients_by_scaling_the_loss():
    zeros = INDICES[PICTURES.train_labels[INDICES] == 0]
    gradients = {}
    for precision in ("fp32", "fp16"):
        model = FlatModel(network(), CPU)
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
    fresh, gathered = FlatModel(network(name), CPU), FlatModel(network(name), CPU)
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


# --- evaluation and precision ---------------------------------------------------------------------


def test_evaluate_counts_and_sums_over_its_part_of_the_test_set():
    model = FlatModel(network("resnet18"), CPU)
    model.buffers.mul_(1.5)  # statistics that a batch would not have
    module = copy.deepcopy(model.network).eval()
    buffers = model.buffers.clone()
    parts = [evaluate(model, PICTURES, "fp32", "test", *part) for part in ((0, 10), (10, 17))]
    with torch.no_grad():
        images, labels = PICTURES.evaluation_batch("test", 0, 17)
        logits = module(images)
    right = labels[logits.argmax(1) == labels].tolist()
    assert [a + b for a, b in zip(parts[0][0], parts[1][0], strict=True)] == [
        right.count(label) for label in range(3)
    ]
    expected = float(cross_entropy(logits, labels, reduction="sum"))
    assert sum(loss for _, loss in parts) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(model.buffers, buffers)


def test_bf16_is_chosen_where_it_is_clearly_faster():
    assert choose_precision({"fp32": 1.0, "bf16": 0.8}) == "bf16"
    assert choose_precision({"fp32": 1.0, "bf16": 0.9}) == "fp32"
    assert choose_precision({"fp32": 1.0, "bf16": 1.6}) == "fp32"
    assert choose_precision({"fp32": 2.0, "bf16": 1.6}) == "bf16"


@pytest.mark.parametrize(("batch_size", "expected"), [(8, 8), (100, 43)])
def test_the_probe_times_a_step_of_each_precision_in_turn(monkeypatch, batch_size, expected):
    calls = []

    def record(engine, pictures, indices, local, lr, seed):
        assert local.steps == 1 and local.batch_size == batch_size and len(indices) == expected
        calls.append(engine.precision)

    monkeypatch.setattr(client, "train", record)
    monkeypatch.setattr(client, "PROBE_SECONDS", 0.0)
    local = replace(PLAIN, batch_size=batch_size, epochs=9)
    seconds = client.probe_precision(FlatModel(network(), CPU), PICTURES, local)
    assert calls == ["fp32", "bf16"] * 2
    assert set(seconds) == {"fp32", "bf16"}
    assert 0 < min(seconds.values()) and max(seconds.values()) < 10


def test_the_probe_takes_its_time(monkeypatch):
    monkeypatch.setattr(client, "PROBE_SECONDS", 0.1)
    begin = time.perf_counter()
    client.probe_precision(FlatModel(network(), CPU), PICTURES, PLAIN)
    assert time.perf_counter() - begin >= 0.1


# --- masks ----------------------------------------------------------------------------------------


def test_pruned_weights_stay_zero_and_have_no_part_in_clipping():
    local = replace(PLAIN, momentum=0.9, weight_decay=0.01, clip=1e-3, epochs=2)
    model = FlatModel(network(), CPU)
    generator = torch.Generator().manual_seed(5)
    pruned = torch.rand(len(model.parameters), generator=generator) < 0.3
    model.parameters.masked_fill_(pruned, 0.0)
    start = model.parameters.clone()

    def keep_zero(x, gradient):
        gradient.masked_fill_(pruned, 0.0)

    run(model, replace(local, steps=1), 0.1, amend=keep_zero)
    assert not model.parameters[pruned].any()
    moved = model.parameters - (1 - 0.1 * 0.01) * start
    assert float(moved.norm()) == pytest.approx(0.1 * 1e-3, rel=1e-2)  # clipped on the mask alone
    run(model, local, 0.1, seed=4, amend=keep_zero)
    assert not model.parameters[pruned].any() and model.parameters[~pruned].any()


@pytest.mark.parametrize("name", ["lenet", "resnet18", "cnn"])
def test_the_gradient_for_masks_is_that_of_autograd_and_leaves_nothing_behind(name):
    model = FlatModel(network(name), CPU)
    before = [model.parameters.clone(), model.buffers.clone(), torch.random.get_rng_state()]
    gradient = loss_gradient(model, PICTURES, INDICES, 8, 4, seed=3)
    after = [model.parameters, model.buffers, torch.random.get_rng_state()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    again = loss_gradient(model, PICTURES, INDICES, 8, 4, seed=3)
    assert torch.equal(gradient, again)
    if name == "cnn":  # dropout: nothing to compare with
        return
    module, generator = network(name).train(), torch.Generator().manual_seed(3)
    order = [INDICES[torch.randperm(22, generator=generator)] for _ in range(2)]
    batches = [*order[0].split(8), *order[1].split(8)][:4]
    for batch in batches:
        images, labels = PICTURES.train_batch(batch, torch.Generator())
        cross_entropy(module(images), labels, reduction="sum").backward()
    expected = torch.cat([p.grad.flatten() for p in module.parameters()]) / (8 + 8 + 6 + 8)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_gradient_for_masks_can_be_interrupted():
    with pytest.raises(Interrupted):
        loss_gradient(FlatModel(network(), CPU), PICTURES, INDICES, 8, 4, 3, lambda: True)


def test_momentum_is_sound_where_the_first_step_overflows(monkeypatch):
    """fp16: torch's fused SGD would go on from uninitialised memory."""
    monkeypatch.setattr("training.engines.FIRST_SCALE_POWER", 22)
    model = FlatModel(network(), CPU)
    junk = torch.full_like(model.parameters, 1e30)  # what freed memory may hold
    del junk
    _, num_skipped = run(model, replace(PLAIN, momentum=0.9, epochs=3), 0.1, "fp16")
    assert model.parameters.abs().max() < 10 and 0 < num_skipped < 9


def test_a_correction_is_applied_to_unscaled_gradients_before_clipping():
    """A correction of 3 in one weight, with everything else zeroed: clipped to 1, in fp16 too."""
    for precision in ("fp32", "fp16"):
        model = FlatModel(network(), CPU)
        start = model.parameters.clone()

        def amend(x, gradient):
            gradient.zero_()
            gradient[5] = 3.0

        run(model, replace(PLAIN, steps=1, clip=1.0), 0.5, precision, amend=amend)
        moved = model.parameters - start
        assert moved[5] == pytest.approx(-0.5, rel=1e-5) and moved.count_nonzero() == 1
