"""fp16 on a CPU against float64: factors rounded once, summed exactly, rounded once."""

import pytest
import torch
from torch.nn.functional import conv2d, cross_entropy, linear

from cnn_model import build_network
from training.engines import autocast
from training.fp16_on_cpu import fp16_on_cpu

CPU = torch.device("cpu")
ULP = 2.0**-10  # of fp16, relative to a number's power of two


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).requires_grad_()


def exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().half().double().requires_grad_()


@pytest.mark.parametrize(
    "product, shapes",
    [(conv2d, [(2, 8, 9, 9), (5, 8, 3, 3), (5,)]), (linear, [(6, 40), (7, 40), (7,)])],
    ids=["conv2d", "linear"],
)
def test_products_and_their_gradients_are_rounded_once(product, shapes):
    given = [numbers(*shape, seed=number) for number, shape in enumerate(shapes)]
    with fp16_on_cpu():
        found = product(*given)
    assert found.dtype == torch.float16
    references = [exact(tensor) for tensor in given]
    reference = product(*references)
    torch.testing.assert_close(found.double(), reference, rtol=ULP, atol=1e-6)

    seed = numbers(*found.shape, seed=9).detach().half()
    gradients = torch.autograd.grad(found, given, seed)
    wanted = torch.autograd.grad(reference, references, seed.double())
    for gradient, expected in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, gradient.half().float())
        torch.testing.assert_close(gradient.double(), expected, rtol=ULP, atol=1e-5)


def test_what_exceeds_fp16_becomes_inf_and_what_is_too_small_zero():
    with fp16_on_cpu():
        large = linear(torch.full((1, 2), 200.0), torch.full((1, 2), 200.0))
        small = linear(torch.full((1, 1), 1e-4), torch.full((1, 1), 1e-4))
    assert torch.isinf(large).all() and small.item() == 0


def test_a_sum_does_not_lose_small_terms_as_one_in_fp16_would():
    """2048 + 1 is 2048 in fp16: a sum in fp16 would stay there."""
    values = torch.ones(1, 4097)
    values[0, 0] = 2048
    with fp16_on_cpu():
        assert linear(values, torch.ones(1, 4097)).item() == 6144


def test_a_network_computes_as_autocast_does_on_a_gpu():
    """Activations are fp16 between layers, gradients fp32, and nearer than in bf16."""
    network = build_network("resnet18", 10, (32, 32), 0, norm="group(8)")
    images, seen, gradients = numbers(4, 3, 32, 32).detach(), {}, {}
    for layer in network.modules():
        kind = type(layer).__name__
        layer.register_forward_hook(lambda _m, _i, out, kind=kind: seen.update({kind: out.dtype}))
    for precision in ("fp32", "bf16", "fp16"):
        with autocast(CPU, precision):
            logits = network(images)
        loss = cross_entropy(logits.float(), torch.arange(4))
        found = torch.autograd.grad(1024 * loss, list(network.parameters()))
        assert {gradient.dtype for gradient in found} == {torch.float32}
        gradients[precision] = torch.cat([g.flatten() for g in found]).double()
    assert seen["Conv2d"] == seen["Linear"] == torch.float16
    errors = {name: (found - gradients["fp32"]).norm() for name, found in gradients.items()}
    assert errors["fp16"] < 0.05 * gradients["fp32"].norm()
    assert errors["fp16"] < errors["bf16"] / 2


def test_other_precisions_are_torchs_own():
    assert type(autocast(CPU, "bf16")) is type(autocast(CPU, "fp32")) is torch.autocast
