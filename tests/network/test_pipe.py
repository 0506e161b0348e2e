"""network/pipe.py: max-min fair rates by their definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from network.pipe import max_min_fair, payload_rate


def test_a_share_of_a_link_carries_payload():
    assert payload_rate(1.514) == pytest.approx(1.448e6 / 8)


def test_the_rest_goes_to_those_who_can_take_it():
    assert max_min_fair(np.array([5.0, 1.0, 9.0]), 12.0).tolist() == [5.0, 1.0, 6.0]
    assert max_min_fair(np.array([5.0, 1.0, 9.0]), 9.0).tolist() == [4.0, 1.0, 4.0]
    assert max_min_fair(np.array([5.0, 1.0]), np.inf).tolist() == [5.0, 1.0]


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=20), st.floats(0.01, 1e6))
def test_no_flow_could_have_more_without_one_with_no_more_having_less(fastest, capacity):
    fastest = np.array(fastest)
    rates = max_min_fair(fastest, capacity)
    assert (rates > 0).all() and (rates <= fastest).all()
    assert rates.sum() == pytest.approx(min(fastest.sum(), capacity))
    limited = rates < fastest
    if limited.any():  # all of them have the same, and nobody has more
        assert rates[limited].max() == pytest.approx(rates[limited].min())
        assert rates.max() <= rates[limited].min() * (1 + 1e-9)
