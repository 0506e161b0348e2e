"""flat_sgd.py against torch.optim.SGD and torch's clipping."""

from dataclasses import replace

import pytest
import torch

from config import Local
from training.flat_sgd import flat_sgd

PLAIN = Local(lr=0.1, momentum=0.0, weight_decay=0.0)
CASES = [
    {},
    dict(momentum=0.9),
    dict(momentum=0.9, nesterov=True),
    dict(weight_decay=0.1),
    dict(clip=0.5),
    dict(clip=1e6),
    dict(momentum=0.8, nesterov=True, weight_decay=0.05, clip=2.0),
]


def gradients(steps: int = 5, size: int = 300) -> torch.Tensor:
    return torch.randn(steps, size, generator=torch.Generator().manual_seed(0))


def with_torch(local: Local, start: torch.Tensor, lr: float) -> torch.Tensor:
    """The same steps by torch.optim.SGD; the decay is a part of the gradient, before clipping."""
    weights = torch.nn.Parameter(start.clone())
    sgd = torch.optim.SGD([weights], lr=lr, momentum=local.momentum, nesterov=local.nesterov)
    for gradient in gradients():
        weights.grad = gradient + local.weight_decay * weights.detach()
        if local.clip:
            torch.nn.utils.clip_grad_norm_([weights], local.clip)
        sgd.step()
    return weights.detach()


@pytest.mark.parametrize("changes", CASES)
def test_steps_equal_those_of_torchs_sgd(changes):
    local, start = replace(PLAIN, **changes), torch.linspace(-1, 1, 300)
    weights, momentum = start.clone(), torch.zeros(300) if local.momentum else None
    for gradient in gradients():
        flat_sgd(weights, gradient, momentum, torch.tensor(0.07), local, None)
    torch.testing.assert_close(weights, with_torch(local, start, 0.07), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("changes", CASES)
def test_rows_step_by_themselves_and_rest_if_they_are_not_active(changes):
    local, start = replace(PLAIN, **changes), torch.linspace(-1, 1, 900).view(3, 300)
    lr, is_active = torch.tensor([[0.1], [0.2], [0.3]]), torch.tensor([[True], [False], [True]])
    rows, momentum = start.clone(), torch.rand(3, 300) if local.momentum else None
    kept = None if momentum is None else momentum[1].clone()
    if momentum is not None:
        momentum[0] = momentum[2] = 0
    for gradient in gradients():
        gradient = gradient.expand(3, -1).clone()
        gradient[1] = torch.nan  # of a lane that takes no step
        flat_sgd(rows, gradient, momentum, lr, local, None, is_active)
    for row in (0, 2):
        expected = with_torch(local, start[row], float(lr[row]))
        torch.testing.assert_close(rows[row], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(rows[1], start[1])
    assert momentum is None or torch.equal(momentum[1], kept)


def test_a_correction_comes_after_the_decay_and_before_clipping():
    local, seen = replace(PLAIN, weight_decay=0.5, clip=1.0), []

    def correct(weights, gradient):
        seen.append((weights.tolist(), gradient.tolist()))
        gradient.copy_(torch.tensor([3.0, 4.0]))

    weights = torch.tensor([2.0, 4.0])
    flat_sgd(weights, torch.ones(2), None, torch.tensor(1.0), local, correct)
    assert seen == [([2.0, 4.0], [2.0, 3.0])]
    torch.testing.assert_close(weights, torch.tensor([2.0 - 0.6, 4.0 - 0.8]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_norm_that_is_not_finite_leaves_gaps_of_zeros(bad):
    weights, gradient = torch.tensor([1.0, 0.0]), torch.tensor([bad, 0.0])
    flat_sgd(weights, gradient, None, torch.tensor(0.1), replace(PLAIN, clip=1.0), None)
    assert not weights[0].isfinite() and weights[1] == 0
