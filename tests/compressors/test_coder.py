"""What every coder declares: its words, and its promises, each measured against its figure."""

import math

import numpy as np
import pytest
import torch
from helpers.vectors import arrived, flat, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compression import CODERS, encode, parse_coder
from layout import Layout

# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "name", "number"),
    [("fp32", "Fp32", 0), ("int8", "Linear", 8), ("qsgd2", "Qsgd", 2), ("eden4", "Eden", 4)]
    + [("bounded(0.01)", "Bounded", 0.01), ("powersgd(4)", "PowerSgd", 4), ("sign", "Sign", 0)]
    + [("int16", "Linear", 16), ("bf16", "Bf16", 0), ("ternary", "Ternary", 0)]
    + [("means2", "Means", 2), ("means4", "Means", 4)],
)
def test_words(word, name, number):
    coder = parse_coder(word)
    assert (type(coder).__name__, coder.number) == (name, number)
    assert str(coder) == word and coder == parse_coder(word)


def test_a_number_may_be_written_in_other_ways():
    assert parse_coder("bounded(1e-2)") == parse_coder("bounded(0.010)")


WRONG = "int int1 int17 int8.5 qsgd1 qsgd9 eden0 eden5 fp64 top8 bounded bounded(0) bounded(0.6)"
WRONG += " bounded(1e-6) bounded(nan) bounded(-1) bounded(1e) bounded(+-) powersgd powersgd(0)"
WRONG += " powersgd(1.5) powersgd(65536) INT8 sign1 ternary(2) int08 int٨ int{} powersgd(+1) sign{}"


@pytest.mark.parametrize("word", ["", " fp32", "int8\n", "int" + "9" * 5000, *WRONG.split()])
def test_other_words_are_refused_with_the_valid_ones(word):
    with pytest.raises(ValueError) as error:
        parse_coder(word)
    assert str(error.value) == (
        f"{word!r} is no way to send values; valid are fp32, fp16, bf16, int2..int16, "
        "qsgd2..qsgd8, ternary, means2..means4, sign, eden1..eden4, "
        "eden(0.001)..eden(1), bounded(3.125e-05)..bounded(0.5), powersgd(1)..powersgd(65535)"
    )


# --- promises -------------------------------------------------------------------------------------

# Of every entry of the table, the ends of its range and what lies between them.
WORDS = "fp32 fp16 bf16 int2 int3 int4 int5 int8 int16 qsgd2 qsgd4 qsgd5 qsgd6 qsgd7 qsgd8 ternary"
WORDS += " means2 means3 means4"
WORDS += " sign eden1 eden2 eden3 eden4 bounded(3.125e-05) bounded(0.03) bounded(0.1) bounded(0.5)"
WORDS += " eden(0.1) eden(1)"
WORDS = [*WORDS.split(), "powersgd(1)", "powersgd(3)", "powersgd(65535)"]

UNBIASED = "fp32 qsgd2 qsgd4 qsgd5 qsgd6 qsgd7 qsgd8 eden1 eden2 eden3 eden4".split()
UNBIASED += ["eden(0.1)", "eden(1)"]
NOT_CONTRACTIVE = ["qsgd2", "qsgd4", "eden(0.1)"]
LENGTHENS = "int2 int3 int4 qsgd2 qsgd4 qsgd5 qsgd6 eden1 eden2 bounded(0.1) bounded(0.5)".split()
LENGTHENS += ["eden(0.1)", "eden(1)"]
RUINS_MODELS = ["int2", "qsgd2", "ternary", "means2", "means3", "sign", "eden1", "bounded(0.5)"]
RUINS_MODELS += WORDS[-5:]

MATRIX = Layout(("m", "bias"), ((8, 10), (4,)))
SHAPES = {
    "noise": noise(84),
    "two": torch.tensor([1.0, 0.5] + [0.0] * 82),
    "one": torch.tensor([0.0] * 40 + [3.0] + [0.0] * 43),
    "constant": torch.full((84,), -2.0),
    "heavy": noise(84).double().mul(2).exp().float() * noise(84, 1).sign(),
}


def squared(vector: torch.Tensor) -> float:
    return float(vector.double().square().sum())


def draws(vector: torch.Tensor, word: str, count: int, layout: Layout) -> torch.Tensor:
    """What arrives with each seed, float64 [count, n]."""
    each = [arrived(vector, word, seed, layout).double() for seed in range(count)]
    return torch.stack(each)


def test_every_entry_of_the_table_is_measured():
    assert {type(parse_coder(word)) for word in WORDS} == set(CODERS)


@pytest.mark.parametrize("word", WORDS)
def test_what_is_declared(word):
    coder = parse_coder(word)
    assert coder.unbiased == (word in UNBIASED) == (coder.variance is not None)
    assert coder.contractive == (word not in NOT_CONTRACTIVE)
    assert coder.keeps_norms == (word not in LENGTHENS)
    assert coder.ruins_models == (word in RUINS_MODELS)
    assert coder.takes_selection == (not word.startswith(("powersgd", "eden(")))


@pytest.mark.parametrize("word", UNBIASED)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_mean_over_draws_converges_to_the_input(word, shape):
    """Its squared error is that of one draw divided by their number, and a bias would show."""
    vector, count = SHAPES[shape], 400
    each = draws(vector, word, count, flat(len(vector)))
    variance = float((each - vector).square().sum(1).mean())
    off = squared(each.mean(0) - vector)
    assert off <= 8 * variance / count + 1e-10 * squared(vector)
    # Blocks of 64 and 16 values, as eden makes here, have up to twice the variance of long ones.
    short = 2 if "eden" in word else 1.1
    assert variance <= short * parse_coder(word).variance * squared(vector) + 1e-10


@pytest.mark.parametrize("word", sorted(set(WORDS) - set(UNBIASED) - {"powersgd(65535)"}))
def test_what_declares_no_variance_is_biased(word):
    """The mean is off by more than the draws spread; rank 65535 leaves small matrices as fp32."""
    vector = noise(84) + 0.01
    each = draws(vector, word, 100, MATRIX)
    variance = float((each - each.mean(0)).square().sum(1).mean())
    assert squared(each.mean(0) - vector) > 20 * variance / 100 + 1e-13


@pytest.mark.parametrize("word", [word for word in UNBIASED if "qsgd" in word])
def test_the_variance_of_qsgd_is_reached_and_never_exceeded(word):
    coder = parse_coder(word)
    worst = coder.steps * (math.sqrt(coder.steps**2 + 511) - coder.steps) / 511
    vector = torch.full((4 * 512,), worst)
    vector[::512] = coder.steps
    error = draws(vector, word, 300, flat(len(vector))) - vector
    ratio = float(error.square().sum(1).mean()) / squared(vector)
    assert ratio == pytest.approx(coder.variance, rel=0.02)
    norms = draws(vector, word, 300, flat(len(vector))).square().sum(1)
    assert (float(norms.mean()) <= 1.05 * squared(vector)) == coder.keeps_norms
    for other in (vector * 1.3, vector / 2, noise(1300), noise(40) ** 5, torch.ones(700)):
        error = draws(other, word, 50, flat(len(other))) - other
        assert float(error.square().sum(1).mean()) <= 1.03 * coder.variance * squared(other)


@pytest.mark.parametrize("word", ["eden1", "eden2", "eden3", "eden4"])
@pytest.mark.parametrize("length", [1024, 8192, 3 * 8192 + 1024])
def test_the_variance_of_eden_is_the_papers(word, length):
    for vector in (noise(length), noise(length) ** 5, torch.eye(1, length)[0], torch.ones(length)):
        error = draws(vector, word, 200_000 // length + 4, flat(length)) - vector
        ratio = float(error.square().sum(1).mean()) / squared(vector)
        assert ratio == pytest.approx(parse_coder(word).variance, rel=0.05)


elements = st.floats(-8, 8, width=32) | st.sampled_from([0.0, 1.0, -1.0, 0.5, 127.0, 1e-20])


def delta(word: str, values: np.ndarray) -> float:
    """The least share of |v|^2 that arrives, from each coder's definition."""
    n = max(len(values), 1)
    if word.startswith(("fp", "bf")):
        return 0.5 / n if word == "fp16" else 0.999
    if word in ("ternary", "sign"):
        kept = np.count_nonzero(values) if word == "ternary" else n
        return float(np.abs(values).sum() ** 2 / kept / np.square(values).sum())
    if word.startswith("means"):  # that of sign, and more
        return float(np.abs(values).sum() ** 2 / n / np.square(values).sum())
    if word.startswith("int"):
        steps = 2 ** (int(word[3:]) - 1) - 1
    else:
        steps = 1 / (2 * float(word[8:-1]))
    return 4 * steps**2 / (4 * steps**2 + n - 1)


DETERMINISTIC = [word for word in WORDS if not word.startswith(("qsgd", "eden", "powersgd"))]


@pytest.mark.parametrize("word", DETERMINISTIC)
@settings(max_examples=60, deadline=None)
@given(values=arrays(np.float32, st.integers(1, 40), elements=elements), shift=st.integers(-40, 40))
def test_what_declares_itself_contractive_is(word, values, shift):
    """At any scale that the coder has the range for."""
    values = np.ldexp(values, 0 if word == "fp16" else shift)
    least = 1e-7 if word == "fp16" else np.finfo(np.float32).tiny  # below, floats have few bits
    if np.abs(values).max() < least:
        return
    exact = values.astype(np.float64)
    lost = np.square(arrived(torch.from_numpy(values), word).numpy() - exact).sum()
    norm = np.square(exact).sum()
    if norm:
        assert lost <= (1 - delta(word, exact)) * norm + 1e-6 * norm
        assert lost < norm


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_powersgd_keeps_in_the_mean_what_as_many_random_columns_would(rank):
    layout = Layout(("m",), ((8, 10),))
    single, low_rank = torch.zeros(8, 10), noise(8)[:, None] * noise(10, 1)
    single[2, 3] = 1.0
    for matrix in (noise(80), single.flatten(), low_rank.flatten(), torch.eye(8, 10).flatten()):
        lost = (draws(matrix, f"powersgd({rank})", 400, layout) - matrix).square().sum(1)
        assert float(lost.max()) <= (1 + 1e-6) * squared(matrix)
        assert float(lost.mean()) <= (1 - 0.9 * rank / 10) * squared(matrix)


@pytest.mark.parametrize("word", ["qsgd2", "qsgd4"])
def test_what_is_not_contractive_can_lose_more_than_there_is(word):
    vector = torch.full((512,), parse_coder(word).steps / 25)
    vector[0] = parse_coder(word).steps
    error = draws(vector, word, 100, flat(512)) - vector
    assert float(error.square().sum(1).mean()) > squared(vector)


@pytest.mark.parametrize("word", [word for word in WORDS if "qsgd" not in word])
def test_norms_are_kept_or_not_as_declared(word):
    """Normal and Laplace numbers, in short and in long vectors."""
    laplace = torch.from_numpy(np.random.default_rng(0).laplace(size=20_000).astype(np.float32))
    ratios = []
    for vector in (noise(84), noise(2048), noise(20_000), laplace):
        layout = MATRIX if len(vector) == 84 else flat(len(vector))
        norms = draws(vector, word, 3 if len(vector) > 84 else 60, layout).square().sum(1)
        ratios.append(float(norms.mean()) / squared(vector))
    assert (max(ratios) <= 1.05) == (word not in LENGTHENS), ratios


@pytest.mark.parametrize("word", ["ternary", "sign"])
@settings(max_examples=60, deadline=None)
@given(values=arrays(np.float32, st.integers(1, 40), elements=elements))
def test_signs_times_a_mean_are_never_longer(word, values):
    norm = squared(torch.from_numpy(values))
    assert squared(arrived(torch.from_numpy(values), word)) <= (1 + 1e-6) * norm


def test_seeds_differ_and_repeat():
    vector = noise(64)
    for word in ("qsgd2", "eden1"):
        assert torch.equal(arrived(vector, word, 3), arrived(vector, word, 3))
        assert not torch.equal(arrived(vector, word, 3), arrived(vector, word, 4))
        arrived(vector, word, 2**80 + 3)  # any integer is a seed
        arrived(vector, word, -1)


@pytest.mark.parametrize("word", WORDS)
def test_what_takes_a_selection_codes_one(word):
    vector, chosen = noise(84), np.arange(0, 84, 3)
    if not parse_coder(word).takes_selection:
        with pytest.raises(ValueError, match="takes no selection"):
            encode(vector, MATRIX, word, lambda *_: chosen)
        return
    sent = encode(vector, MATRIX, word, lambda *_: chosen)[1]
    assert np.isin(sent.indices, chosen).all() and len(sent.indices)
