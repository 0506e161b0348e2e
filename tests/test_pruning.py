"""pruning.py against a stable sort, against torch.topk where nothing ties, and worked examples."""

import math

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
    """Both ways of doing it; that of other devices is plain torch and runs on a CPU as well."""
    vector = torch.as_tensor(vector, dtype=torch.float32)
    before, expected = vector.clone(), naive_topk(vector, k)
    kept = pruning.topk(vector, k)
    assert kept.dtype == np.int64
    np.testing.assert_array_equal(kept, expected)
    if 0 < k < len(vector):
        np.testing.assert_array_equal(pruning.largest_in_rows(vector[None], k), expected)
    assert torch.equal(vector, before)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_topk_is_a_stable_sort_with_many_ties(data):
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 1e-45, 3e38])
    if data.draw(st.booleans(), "any float"):
        values = st.floats(width=32, allow_nan=False)
    vector = data.draw(st.lists(values, min_size=1, max_size=200))
    check(vector, data.draw(st.integers(1, len(vector) + 2)))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_other_devices_select_what_a_cpu_does(data):
    """Their code, run on a CPU, with ties, tensors of one entry and chunks that do not divide."""
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    offsets = [0, *np.cumsum(sizes).tolist()]
    levels = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 1e-45])
    numbers = data.draw(st.lists(levels, min_size=offsets[-1], max_size=offsets[-1]))
    vector, density = torch.tensor(numbers), data.draw(st.sampled_from([0.01, 0.3, 1.0]))
    limit, chunk = data.draw(st.sampled_from([0.0, 0.5, 1.0])), data.draw(st.integers(1, 50))
    selections = [
        lambda: pruning.topk(vector, pruning.num_kept(density, len(vector))),
        lambda: pruning.topk_per_layer(vector, density, offsets),
        lambda: pruning.topk_per_chunk(vector, density, chunk),
        lambda: pruning.threshold(vector, limit),
        lambda: pruning.threshold(vector, limit, relative=True),
    ]
    expected = [select() for select in selections]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "is_on_cpu", lambda vector: False)
        for select, positions in zip(selections, expected, strict=True):
            found = select()
            assert isinstance(found, torch.Tensor) and found.dtype == torch.int64
            np.testing.assert_array_equal(found, positions)


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
    assert len(pruning.topk_per_layer(torch.zeros(0), 0.5, [0])) == 0  # no tensor is left


def test_threshold_is_strict_and_of_the_magnitude():
    vector = torch.tensor([0.5, -0.5, 0.50001, -0.50001, 0.0, -7.0, 0.49])
    kept = pruning.threshold(vector, 0.5)
    assert kept.dtype == np.int64 and kept.tolist() == [2, 3, 5]
    assert pruning.threshold(vector, 0.0).tolist() == [0, 1, 2, 3, 5, 6]
    assert pruning.threshold(vector, 7.0).tolist() == []


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("limit", [0.0, 0.5, 1.0, 1e30])
def test_threshold_finds_what_a_comparison_finds(size, limit):
    """Values are multiples of 1/4, so that many are as large as the limit."""
    vector = torch.randint(-8, 9, (size,), generator=torch.Generator().manual_seed(size)) / 4
    for form in (vector, vector.repeat_interleave(2)[::2]):  # the second one has gaps in memory
        expected = (form.abs() > limit).nonzero().flatten().tolist()
        assert pruning.threshold(form, limit).tolist() == expected


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.999, 1.0])
def test_a_relative_threshold_is_a_share_of_the_largest_magnitude(share):
    vector = torch.tensor([0.5, -2.0, 1.0, 0.0, -1.0, 1.5])
    expected = [i for i, value in enumerate(vector.tolist()) if abs(value) > share * 2.0]
    assert pruning.threshold(vector, share, relative=True).tolist() == expected
    assert pruning.threshold(torch.zeros(3), share, relative=True).tolist() == []
    assert pruning.threshold(torch.zeros(0), share, relative=True).tolist() == []


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_topk_per_chunk_is_a_stable_sort_of_each_chunk(data):
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, 3e38])
    if data.draw(st.booleans(), "any float"):
        values = st.floats(width=32, allow_nan=False)
    vector = np.array(data.draw(st.lists(values, max_size=100)), np.float32)
    chunk = data.draw(st.integers(1, 40))
    density = data.draw(st.sampled_from([1e-9, 0.05, 0.25, 0.5, 0.9, 1.0]))
    expected = []
    for start in range(0, len(vector), chunk):
        piece = vector[start : start + chunk]
        expected += [start + i for i in naive_topk(piece, pruning.num_kept(density, len(piece)))]
    kept = pruning.topk_per_chunk(torch.from_numpy(vector), density, chunk)
    assert kept.dtype == np.int64 and kept.tolist() == expected


def splitmix64(seed: int, count: int) -> list[int]:
    """Sebastiano Vigna's splitmix64.c in Python's integers."""
    outputs = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) % 2**64
        z = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        outputs.append(z ^ z >> 31)
    return outputs


def test_the_oracle_gives_the_published_outputs():
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("size", [1, 2, 10, 500])
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**64 - 1])
def test_random_keeps_the_smallest_hashes(size, seed):
    hashes = splitmix64(seed, size)
    for k in {0, 1, size // 3, size - 1, size, size + 1}:
        expected = sorted(sorted(range(size), key=hashes.__getitem__)[:k])
        kept = pruning.random(size, k, seed)
        assert kept.dtype == np.int64 and kept.tolist() == expected


def test_random_without_enough_likely_hashes_looks_at_all(monkeypatch):
    monkeypatch.setattr(pruning.math, "isqrt", lambda k: -10)  # a guess that is far too low
    hashes = splitmix64(5, 300)
    expected = sorted(sorted(range(300), key=hashes.__getitem__)[:100])
    assert pruning.random(300, 100, 5).tolist() == expected


def test_random_takes_every_position_equally_often():
    counts = np.bincount(
        np.concatenate([pruning.random(50, 10, seed) for seed in range(2000)]), minlength=50
    )
    assert counts.sum() == 20_000
    chi2 = ((counts - 400) ** 2 / (400 * 0.8)).sum()  # drawn without replacement
    assert 23 < chi2 < 86  # 49 degrees of freedom, 0.1% on either side


SIZES = st.lists(st.integers(1, 3000), min_size=1, max_size=12).map(np.array)


@given(SIZES, st.floats(0.001, 1))
def test_a_layers_share_of_a_random_choice(sizes, density):
    """min(size, c size^(2/3)), for the c whose sum is k as bisection finds it, and at least 1."""
    k = pruning.num_kept(density, int(sizes.sum()))
    low, high = 0.0, float(sizes.max())
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if np.minimum(sizes, c * sizes ** (2 / 3)).sum() < k else (low, c)
    exact = np.minimum(sizes, high * sizes ** (2 / 3))
    counts = pruning.layer_counts(sizes, k)
    assert (1 <= counts).all() and (counts <= sizes).all()
    assert (np.abs(counts - np.maximum(1, exact)) <= 0.5 + 1e-6 * sizes).all()


def test_a_random_choice_by_layer_says_what_makes_it_unbiased():
    sizes = np.array([5, 400, 30])
    chosen, factors = pruning.random_by_layer(sizes, 60, seed=3)
    counts = pruning.layer_counts(sizes, 60)
    starts = np.array([0, 5, 405, 435])
    assert np.histogram(chosen, starts)[0].tolist() == counts.tolist()
    second = chosen[counts[0] : counts[0] + counts[1]]
    assert second.tolist() == (5 + pruning.random(400, int(counts[1]), 8)).tolist()
    assert factors.tolist() == np.repeat(sizes / counts, counts).astype(np.float32).tolist()


def test_density_warms_up_and_then_stays():
    densities = [pruning.density_at(0.001, [0.25, 0.0625, 0.0156, 0.004], n) for n in range(1, 8)]
    assert densities == [0.25, 0.0625, 0.0156, 0.004, 0.001, 0.001, 0.001]
    assert pruning.density_at(0.5, [], 1) == 0.5


# --- masks ----------------------------------------------------------------------------------------

SHAPES = ((4, 3), (4,), (2, 4), (2,))  # 12 + 4 + 8 + 2 weights


def test_snip_scores_are_the_sensitivities_with_a_mean_of_one():
    scores = pruning.snip_scores(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([-3.0, 1.5, 9.0]))
    torch.testing.assert_close(scores, torch.tensor([1.5, 1.5, 0.0]))
    assert pruning.snip_scores(torch.zeros(4), torch.ones(4)).tolist() == [0, 0, 0, 0]


def test_keep_mask_ranks_all_weights_together_and_keeps_biases():
    scores = torch.zeros(26)
    scores[[2, 5, 16, 20]] = torch.tensor([0.5, 4.0, 3.0, 1.0])
    scores[12:16] = 100  # biases: neither ranked nor dropped
    biases = [12, 13, 14, 15, 24, 25]
    assert pruning.keep_mask(scores, 0.10, SHAPES).tolist() == sorted([5, 16, *biases])
    assert pruning.keep_mask(scores, 0.15, SHAPES).tolist() == sorted([5, 16, 20, *biases])
    assert pruning.keep_mask(scores, 0.20, SHAPES).tolist() == sorted([2, 5, 16, 20, *biases])
    assert pruning.keep_mask(scores, 1.0, SHAPES).tolist() == list(range(26))


def test_keep_mask_leaves_every_layer_its_best_weight():
    scores = torch.arange(26, dtype=torch.float32)
    scores[:12] *= 1e-6  # a global ranking would empty the first layer
    for density in (1e-9, 0.05, 0.3):
        mask = pruning.keep_mask(scores, density, SHAPES)
        assert 11 in mask and 23 in mask
        assert len(mask) == max(pruning.num_kept(density, 20), 2) + 6


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=6),
    st.floats(0.01, 1.0),
)
def test_erk_counts_meet_the_density_with_shares_as_in_the_paper(shapes, density):
    shapes = [(*shape, 5) for shape in shapes] + [(7,)]
    counts, sizes = pruning.erk_counts(shapes, density), [math.prod(s) for s in shapes]
    assert counts[-1] == 7
    assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
    target = density * sum(sizes[:-1])
    assert abs(sum(counts[:-1]) - target) <= len(shapes)
    scales = [
        (count / sum(shape), sum(shape))
        for count, size, shape in zip(counts[:-1], sizes, shapes, strict=False)
        if 1 < count < size
    ]
    for scale, fan in scales:  # the same factor everywhere, up to rounding a count
        for other, other_fan in scales:
            assert abs(scale - other) <= 0.5 / fan + 0.5 / other_fan + 1e-9


def test_random_mask_draws_each_tensor_from_its_own_seed():
    mask = pruning.random_mask(SHAPES, 0.5, 9)
    first, second = pruning.erk_counts(SHAPES, 0.5)[::2]
    hashes = [splitmix64(9, 12), splitmix64(9 + 16, 8)]
    expected = sorted(sorted(range(12), key=hashes[0].__getitem__)[:first])
    expected += [12, 13, 14, 15]
    expected += [16 + i for i in sorted(sorted(range(8), key=hashes[1].__getitem__)[:second])]
    assert mask.dtype == np.int64 and mask.tolist() == [*expected, 24, 25]


def test_the_regrown_share_decays_as_half_a_cosine():
    shares = [pruning.regrown_share(0.3, n, 100) for n in (0, 50, 100)]
    np.testing.assert_allclose(shares, [0.3, 0.15, 0.0], atol=1e-12)


def test_growth_candidates_are_the_largest_gradients_outside_the_mask():
    mask = np.array([0, 1, 2, 3, 12, 13, 14, 15, 16, 17, 24, 25])
    gradients = torch.zeros(26)
    gradients[mask] = 100.0  # inside, so nobody's candidate
    gradients[[5, 7, 9]] = torch.tensor([-3.0, 2.0, 1.0])
    gradients[[18]] = 0.1
    candidates = pruning.growth_candidates(gradients, mask, 0.5, SHAPES)
    assert candidates.dtype == np.int64 and candidates.tolist() == [5, 7, 18]
    assert pruning.growth_candidates(gradients, mask, 0.2, SHAPES).tolist() == []


def test_drop_and_grow_swaps_the_smallest_weights_for_the_largest_gradients():
    mask = np.array([0, 1, 2, 3, 12, 13, 14, 15, 16, 17, 18, 19, 24, 25])
    weights, growth = torch.zeros(26), torch.zeros(26)
    weights[mask] = 1.0
    weights[[1, 2]] = torch.tensor([0.1, -0.2])  # dropped, at half of four
    weights[[16, 17, 18]] = torch.tensor([0.0, 0.1, 0.2])  # only one of these can be replaced
    growth[[5, 7, 9, 23]] = torch.tensor([1.0, 3.0, 2.0, 0.5])
    growth[[1, 12]] = 50.0  # on the mask: does not count
    following = pruning.drop_and_grow(mask, weights, growth, 0.5, SHAPES)
    assert following.tolist() == [0, 3, 7, 9, 12, 13, 14, 15, 17, 18, 19, 23, 24, 25]
    assert pruning.drop_and_grow(mask, weights, growth, 0.0, SHAPES).tolist() == mask.tolist()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.05, 0.9), st.floats(0.0, 1.0))
def test_drop_and_grow_keeps_every_count(seed, density, share):
    mask = pruning.random_mask(SHAPES, density, seed)
    weights, growth = (torch.from_numpy(normal(26, seed + i)) for i in (1, 2))
    following = pruning.drop_and_grow(mask, weights, growth.abs(), share, SHAPES)
    offsets = [0, 12, 16, 24, 26]
    assert np.array_equal(np.unique(following), following)
    assert np.histogram(following, offsets)[0].tolist() == np.histogram(mask, offsets)[0].tolist()
    assert {*range(12, 16), 24, 25} <= set(following.tolist())


def test_sparse_gains_make_up_for_the_weights_that_are_missing():
    mask = np.array([0, 1, 2, 12, 13, 14, 15, 16, 17, 24, 25])  # 3 of 12 and 2 of 8
    gains = pruning.sparse_gains(mask, SHAPES)
    assert gains.tolist() == [2.0] * 12 + [1.0] * 4 + [2.0] * 8 + [1.0] * 2
