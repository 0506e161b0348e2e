"""powersgd.py: what a projection onto few columns keeps."""

import pytest
import torch
from helpers.payloads import picking
from helpers.vectors import arrived, flat, noise

from compression import encode
from layout import Layout


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_powersgd_is_exact_on_matrices_of_its_rank(rank):
    layout = Layout(("conv", "bias"), ((20, 5, 3, 2), (20,)))
    matrix = noise(20 * rank).reshape(20, rank) @ noise(30 * rank, 1).reshape(rank, 30)
    vector = torch.cat((matrix.flatten(), noise(20, 2)))
    sent = arrived(vector, f"powersgd({rank})", layout=layout)
    torch.testing.assert_close(sent[:600], vector[:600], rtol=1e-4, atol=1e-5)
    assert torch.equal(sent[600:], vector[600:])


def test_powersgd_projects_and_sends_what_factors_do_not_shorten():
    layout = Layout(("m", "thin"), ((40, 50), (2, 3)))
    vector = noise(layout.size)
    payload, sent = encode(vector, layout, "powersgd(2)")
    assert len(payload) == 32 + 2 + 4 * 2 * 90 + 4 * 6
    whole, kept = vector[:2000].double(), sent.dense()[:2000].double()
    residual = whole - kept  # orthogonal to what was kept: P has orthonormal columns
    assert abs(float(residual @ kept)) < 1e-5 * float(whole @ whole)
    assert 0 < float(residual @ residual) < float(whole @ whole)
    assert torch.equal(sent.dense()[2000:], vector[2000:])


def test_powersgd_takes_no_selection():
    with pytest.raises(ValueError, match=r"powersgd\(1\) .* takes no selection"):
        encode(noise(7), flat(7), "powersgd(1)", picking([1]))
