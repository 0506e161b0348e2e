"""correction.py: what is corrected, and that a held correction never moves."""

import torch

from algorithms import FedProx, LocalRound, SCAFFOLDRound
from training.correction import Correction, Held


def scaffold(seed: int, size: int = 6) -> SCAFFOLDRound:
    c, c_i = torch.arange(2.0 * size).view(2, size) * (seed + 1)
    return SCAFFOLDRound(c, c_i, None)


def corrected(correction: Correction, size: int = 6) -> list[float]:
    gradient = torch.ones(size)
    correction(torch.full((size,), 2.0), gradient)
    return gradient.tolist()


def test_a_correction_by_hand():
    pull = FedProx(0.5).before(torch.zeros(6), None, None, None)  # 0.5 * (2 - 0) in each entry
    pruned = torch.tensor([True, False, False, False, False, True])
    assert corrected(Correction(pull, None, None)) == [2.0] * 6
    assert corrected(Correction(pull, torch.tensor([1, 2]), None)) == [2, 1, 1, 2, 2, 2]
    assert corrected(Correction(pull, torch.tensor([1, 2]), pruned)) == [0, 1, 1, 2, 2, 0]
    assert corrected(Correction(LocalRound(), None, pruned)) == [0, 1, 1, 1, 1, 0]


def addresses(correction: Correction) -> list[int]:
    vectors = [v for v in vars(correction.local_round).values() if torch.is_tensor(v)]
    vectors += [correction.pruned] if correction.pruned is not None else []
    return [vector.data_ptr() for vector in vectors]


def test_a_held_correction_takes_the_next_ones_values_and_keeps_its_addresses():
    held, places = Held(), []
    for seed in (0, 1, 2):
        given = Correction(scaffold(seed), None, torch.arange(6) == seed)
        kept = held.take(given)
        assert corrected(kept) == corrected(given)
        assert not set(addresses(kept)) & set(addresses(given))
        places.append(addresses(kept))
    assert len(places[0]) == 3 and places[0] == places[1] == places[2]


def test_a_kind_comes_back_to_where_it_was():
    held = Held()
    first = held.take(Correction(scaffold(0), None, None))
    assert held.take(None) is None
    masked = held.take(Correction(scaffold(1), None, torch.zeros(6, dtype=torch.bool)))
    assert masked is not first
    again = Correction(scaffold(2), None, None)
    assert held.take(again) is first and corrected(first) == corrected(again)
    assert held.take(Correction(scaffold(0, size=7), None, None)) is not first
