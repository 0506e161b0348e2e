"""network/draws.py: stateless, uniform and normal, one by one as all at once."""

import numpy as np
import pytest

from network.draws import normal, uniform


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_draw_depends_on_its_own_keys_alone(draw):
    clients = np.arange(10, 1000)
    together = draw(7, "speed", 3, clients)
    assert [float(draw(7, "speed", 3, client)) for client in clients[:5]] == together[:5].tolist()
    assert np.array_equal(draw(7, "speed", 3, clients[::-1]), together[::-1])
    others = [
        draw(8, "speed", 3, clients),
        draw(7, "link", 3, clients),
        draw(7, "speed", 4, clients),
    ]
    others += [draw(7, "speed", clients, 3)]
    for other in others:
        assert not np.isin(other, together).any()
        assert abs(np.corrcoef(other, together)[0, 1]) < 0.12


def test_draws_have_the_moments_of_their_distributions():
    places = np.arange(200_000)
    flat, bell = uniform(1, "u", places), normal(1, "n", places)
    assert 0 < flat.min() and flat.max() < 1
    counts = np.histogram(flat, 20, (0, 1))[0]
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 43.8  # chi-square of 19 degrees, p = 0.001
    assert bell.mean() == pytest.approx(0, abs=0.01)
    assert bell.std() == pytest.approx(1, abs=0.01)
    assert np.mean(np.abs(bell) < 1.96) == pytest.approx(0.95, abs=0.003)
