"""pruning.py against a stable sort, and against torch.topk where nothing ties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pruning

STRIDE = pruning.SAMPLE_STRIDE


def naive_topk(vector, k: int) -> np.ndarray:
    """The k largest magnitudes, the lowest index first where they tie, by a stable sort."""
    return np.sort(np.argsort(-np.abs(np.asarray(vector)), kind="stable")[:k])


def check(vector, k: int) -> None:
    """Both ways of doing it; the CUDA one is plain torch and runs on a CPU as well."""
    vector = torch.as_tensor(vector, dtype=torch.float32)
    before, expected = vector.clone(), naive_topk(vector, k)
    kept = pruning.topk(vector, k)
    assert kept.dtype == np.int64
    np.testing.assert_array_equal(kept, expected)
    if 0 < k < len(vector):
        np.testing.assert_array_equal(pruning._topk_cuda(vector, k), expected)
    assert torch.equal(vector, before)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_topk_is_a_stable_sort_with_many_ties(data):
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 1e-45, 3e38])
    if data.draw(st.booleans(), "any float"):
        values = st.floats(width=32, allow_nan=False)
    vector = data.draw(st.lists(values, min_size=1, max_size=200))
    check(vector, data.draw(st.integers(1, len(vector) + 2)))


@pytest.mark.parametrize("size", [1, 2, 3, 10, 60, 61, 62, 122, 123, 200])
def test_topk_of_tiny_vectors_for_every_k(size):
    rng = np.random.default_rng(size)
    coarse = rng.integers(-3, 4, size).astype(np.float32)
    for k in range(1, size + 3):
        check(rng.standard_normal(size), k)
        check(coarse, k)


def normal(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def only_at_the_sample(size: int) -> np.ndarray:
    """Large where the sample looks: it sees too high a floor."""
    vector = normal(size)
    vector[::STRIDE] += 100
    return vector


def never_at_the_sample(size: int) -> np.ndarray:
    """Large everywhere but where the sample looks: it sees too low a floor."""
    vector = normal(size) + 100
    vector[::STRIDE] -= 100
    return vector


def two_levels(size: int) -> np.ndarray:
    """The sample's level is also the level of all ties."""
    return np.where(np.arange(size) % STRIDE == 0, 2.0, 1.0)


HARD = {
    "constant": lambda n: np.full(n, -3.0),
    "zeros": np.zeros,
    "only at the sample": only_at_the_sample,
    "never at the sample": never_at_the_sample,
    "two levels": two_levels,
    "ascending": lambda n: np.arange(n) / n,
    "descending": lambda n: -np.arange(n)[::-1] / n,
    "denormal": lambda n: normal(n) * 1e-40,
    "huge": lambda n: np.sign(normal(n)) * (3.0e38 + np.arange(n) * 1e33),
    "a few large": lambda n: np.where(np.arange(n) % 997 == 5, 1e6, normal(n)),
    "mostly zero": lambda n: np.where(np.arange(n) % 53 == 7, normal(n), 0),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("k", [1, 2, 7, 100, 101, 500, 3000, 6099, 6100, 6101])
def test_topk_of_hard_vectors(name, k):
    check(HARD[name](STRIDE * 100), k)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.3])
def test_topk_equals_torch_topk_on_a_long_vector(density):
    vector = torch.from_numpy(normal(200_003))
    k = pruning.num_kept(density, len(vector))
    expected = torch.topk(vector.abs(), k).indices.sort().values.numpy()
    np.testing.assert_array_equal(pruning.topk(vector, k), expected)


def test_topk_does_not_trip_over_what_is_not_finite():
    """Selection comes before encode(), which is where such an update is refused."""
    for bad in (float("nan"), float("inf")):
        for count in (1, 300, 500):
            vector = torch.from_numpy(normal(500))
            vector[:count] = bad
            for k in (1, 5, 499):
                assert len(pruning.topk(vector, k)) <= k
                pruning.threshold(vector, 0.5)


@pytest.mark.parametrize("k", [100, 1000, 10_000])
def test_the_floor_leaves_enough_and_not_many_more(k):
    """What makes it fast: on ordinary vectors about k survive, and the fallback is rare."""
    for seed in range(10):
        magnitudes = np.abs(normal(200_000, seed))
        survivors = int((magnitudes >= pruning._floor(magnitudes, k)).sum())
        assert k <= survivors < 2 * k + 2000


@pytest.mark.parametrize(
    ("density", "size", "expected"),
    [(0.01, 11_173_962, 111_740), (0.01, 1, 1), (1e-9, 10, 1), (1.0, 10, 10), (0.5, 3, 2)]
    + [(0.3, 0, 0), (0.25, 8, 2), (0.25, 9, 3), (0.1, 30, 3), (0.07, 100, 7), (0.55, 100, 55)],
)
def test_num_kept_rounds_up_and_never_beyond_the_size(density, size, expected):
    assert pruning.num_kept(density, size) == expected


def test_topk_per_layer_ranks_each_tensor_on_its_own():
    sizes = [5, 1, 0, 300, 64]
    offsets = np.cumsum([0, *sizes])
    vector = torch.from_numpy(normal(offsets[-1]))
    vector[:5] *= 1000  # a global ranking would take only these
    for density in (0.01, 0.2, 0.5, 1.0):
        expected = []
        for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
            k = pruning.num_kept(density, stop - start)
            expected += [start + i for i in naive_topk(vector[start:stop], k)]
        kept = pruning.topk_per_layer(vector, density, offsets)
        assert kept.dtype == np.int64 and kept.tolist() == expected


def test_threshold_is_strict_and_of_the_magnitude():
    vector = torch.tensor([0.5, -0.5, 0.50001, -0.50001, 0.0, -7.0, 0.49])
    kept = pruning.threshold(vector, 0.5)
    assert kept.dtype == np.int64 and kept.tolist() == [2, 3, 5]
    assert pruning.threshold(vector, 0.0).tolist() == [0, 1, 2, 3, 5, 6]
    assert pruning.threshold(vector, 7.0).tolist() == []
