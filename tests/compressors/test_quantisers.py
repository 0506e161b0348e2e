"""The value coders: what each does to numbers, from its paper or by hand."""

import math

import numpy as np
import pytest
import torch
from helpers import naive_decoder
from helpers.payloads import cases, picking
from hypothesis import given, settings
from hypothesis import strategies as st

from compression import encode, parse_values
from compressors.eden import CENTROIDS, blocks
from layout import Layout


def flat(count: int) -> Layout:
    return Layout(("w",), ((count,),))


def arrived(vector: torch.Tensor, word: str, seed: int = 0, layout: Layout | None = None):
    return encode(vector, layout or flat(len(vector)), word, seed=seed)[1].dense()


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(count, np.float32))


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "name", "number"),
    [("fp32", "fp32", 0), ("int8", "int", 8), ("qsgd2", "qsgd", 2), ("eden4", "eden", 4)]
    + [("bounded(0.01)", "bounded", 0.01), ("bounded(1e-3)", "bounded", 1e-3)]
    + [("powersgd(4)", "powersgd", 4), ("sign", "sign", 0), ("int16", "int", 16)],
)
def test_words(word, name, number):
    values = parse_values(word)
    assert (values.name, values.number) == (name, number)


WRONG = "int int1 int17 int8.5 qsgd1 qsgd9 eden0 eden5 fp64 top8 bounded bounded(0) bounded(0.6)"
WRONG += " bounded(1e-6) bounded(nan) bounded(-1) bounded(1e) bounded(+-) powersgd powersgd(0)"
WRONG += " powersgd(1.5) powersgd(65536) INT8 sign1 ternary(2)"


@pytest.mark.parametrize("word", ["", " fp32", "int8\n", *WRONG.split()])
def test_other_words_are_refused_with_the_valid_ones(word):
    with pytest.raises(ValueError, match=r"valid are fp32, .* bounded\(EPS\) .* powersgd\(R\)"):
        parse_values(word)


def test_powersgd_takes_no_selection():
    with pytest.raises(ValueError, match="no selection"):
        encode(noise(7), flat(7), "powersgd(1)", picking([1]))


# --- levels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 17))
def test_linear_values_are_off_by_half_a_step_at_most(bits):
    vector = noise(1000)
    step = float(vector.abs().max()) / (2 ** (bits - 1) - 1)
    assert float((arrived(vector, f"int{bits}") - vector).abs().max()) <= step / 2 * (1 + 1e-3)


@pytest.mark.parametrize("eps", [0.5, 0.3, 0.25, 0.1, 0.01, 1e-3, 1 / 32000])
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_bounded_keeps_its_bound_to_the_last_bit(eps, case):
    vector, layout, _ = case
    sent = encode(vector, layout, f"bounded({eps})")[1].dense().double()
    exact = vector.double()  # differences of float32 numbers of like size are exact in float64
    if len(exact):
        assert bool(((sent - exact).abs() <= eps * exact.abs().max()).all())


def test_ternary_and_sign_by_hand():
    vector = torch.tensor([4.0, 0.0, -1.0, 0.0, -1.0])
    assert arrived(vector, "ternary").tolist() == [2, 0, -2, 0, -2]
    values = [float(np.float32(1.2)) * sign for sign in (1, 1, -1, 1, -1)]
    assert arrived(vector, "sign").tolist() == values
    chosen = encode(vector, flat(5), "sign", picking([0, 1, 2]))[1]
    assert chosen.indices.tolist() == [0, 1, 2]
    np.testing.assert_allclose(chosen.values, [5 / 3, 5 / 3, -5 / 3], rtol=2e-7)
    chosen = encode(vector, flat(5), "ternary", picking([0, 1, 2]))[1]
    assert chosen.indices.tolist() == [0, 2] and chosen.values.tolist() == [2.5, -2.5]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_qsgd_is_what_the_page_says(bits):
    vector, seed = noise(1300), 77
    steps, expected = 2 ** (bits - 1) - 1, []
    for i, value in enumerate(vector.tolist()):
        start = i // 512 * 512
        largest = float(vector[start : start + 512].abs().max())
        scale = np.float32(largest / steps)
        if float(scale) * steps > largest:
            scale = np.nextafter(scale, np.float32(0))
        uniform = (naive_decoder.random_number(seed, i) >> 11) / 2**53
        level = min(math.floor(abs(value) / float(scale) + uniform), steps)
        expected.append(float(np.float32(level) * scale) * (1 if value > 0 else -1))
    assert arrived(vector, f"qsgd{bits}", seed).tolist() == expected


def test_sparse_levels_are_coded_where_that_is_shorter():
    vector = noise(20_000)
    vector[torch.from_numpy(np.random.default_rng(1).choice(20_000, 400, replace=False))] *= 1000
    for word in ("bounded(0.05)", "ternary", "qsgd4"):
        dense = vector if word != "ternary" else vector * (vector.abs() > 100)
        payload, sent = encode(dense, flat(len(dense)), word)
        assert payload[5] == 2 and len(payload) < 20_000 / 8 and (sent.values != 0).all()
    payload, _ = encode(noise(20_000), flat(20_000), "ternary")
    assert payload[5] == 0


def test_packed_values_are_compressed_where_that_is_shorter():
    layout = Layout(("a", "b"), ((4000,), (4000,)))
    vector = torch.cat((torch.full((4000,), 1.0), noise(4000)))
    payload, _ = encode(vector, layout, "int8")
    assert payload[7] == 1 and len(payload) < 6000
    payload, _ = encode(torch.rand(500, generator=torch.Generator()), flat(500), "int8")
    assert payload[7] == 0


# --- unbiased -------------------------------------------------------------------------------------

SHAPES = {
    "noise": noise(80),
    "two": torch.tensor([1.0, 0.5] + [0.0] * 78),
    "one": torch.tensor([0.0] * 40 + [3.0] + [0.0] * 39),
    "constant": torch.full((80,), -2.0),
    "heavy": noise(80).double().mul(2).exp().float() * noise(80, 1).sign(),
}


@pytest.mark.parametrize("word", ["qsgd2", "qsgd4", "qsgd8", "eden1", "eden2", "eden3", "eden4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_mean_over_draws_converges_to_the_input(word, shape):
    """Its squared error is that of one draw divided by their number, and a bias would show."""
    vector, draws = SHAPES[shape].double(), 400
    each = torch.stack([arrived(vector.float(), word, seed).double() for seed in range(draws)])
    variance = float((each - vector).square().sum(1).mean())
    off = float((each.mean(0) - vector).square().sum())
    assert off <= 8 * variance / draws + 1e-10 * float(vector.square().sum())


def test_seeds_differ_and_repeat():
    vector = noise(64)
    for word in ("qsgd2", "eden1"):
        assert torch.equal(arrived(vector, word, 3), arrived(vector, word, 3))
        assert not torch.equal(arrived(vector, word, 3), arrived(vector, word, 4))
        arrived(vector, word, 2**80 + 3)  # any integer is a seed
        arrived(vector, word, -1)


# --- EDEN -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "published"), [(1, 0.571), (2, 0.133), (3, 0.0358), (4, 0.0096)])
@pytest.mark.parametrize("heavy", [False, True])
def test_the_error_of_eden_is_the_published_one(bits, published, heavy):
    """arXiv 2108.08842: vNMSE of .571, .133, .0358 and .0096, here within 2%."""
    vector = noise(20 * 8192 + 4096)
    vector = vector**5 if heavy else vector
    error = (arrived(vector, f"eden{bits}", 9).double() - vector.double()).square().sum()
    assert float(error / vector.double().square().sum()) == pytest.approx(published, rel=0.02)


def lloyd_max(bits: int) -> list[float]:
    """The positive values of the best quantiser of N(0, 1), by Lloyd's iteration."""

    def pdf(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def cdf(x: float) -> float:
        return math.erf(x / math.sqrt(2)) / 2

    values = [0.3 * (2 * i + 1) for i in range(2 ** (bits - 1))]
    for _ in range(3000):
        edges = [0.0, *((a + b) / 2 for a, b in zip(values, values[1:], strict=False)), 40.0]
        cells = zip(edges, edges[1:], strict=False)
        values = [(pdf(a) - pdf(b)) / (cdf(b) - cdf(a)) for a, b in cells]
    return values


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_centroids_are_those_of_lloyd_and_max(bits):
    np.testing.assert_allclose(CENTROIDS[bits], lloyd_max(bits), rtol=2e-7)
    written = [float(x) for x in naive_decoder.POSITIVE_CENTROIDS[bits].split()]
    assert list(CENTROIDS[bits]) == written


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 100_000))
def test_blocks_need_no_padding(count):
    sizes = blocks(count).tolist()
    assert sizes == naive_decoder.blocks_of(count) and 0 <= count - sum(sizes) < 16
    assert sizes == sorted(sizes, reverse=True)


def test_a_block_of_zeros_arrives_as_zeros_and_short_vectors_unchanged():
    vector = torch.cat((torch.zeros(8192), noise(8192)))
    assert torch.equal(arrived(vector, "eden2")[:8192], torch.zeros(8192))
    assert torch.equal(arrived(noise(15), "eden1"), noise(15))


def test_eden_golden_bytes():
    payload, _ = encode(torch.arange(17.0) - 8, flat(17), "eden2", seed=1)
    assert payload[24:].hex() == GOLDEN


GOLDEN = "020100000000000000b26cba3e5ad853aa000000412f9aeb28ddf746be"


# --- PowerSGD -------------------------------------------------------------------------------------


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
