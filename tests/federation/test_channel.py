"""Channels: support x selection x values, and error feedback around them."""

import numpy as np
import pytest
import torch
from helpers.payloads import WORDS

import pruning
from compression import NotFinite, parse_coder
from config import Config, Pruning
from federation.channel import Channel, ErrorFeedback
from layout import Layout
from wire.container import OVERHEAD, PayloadError

LAYOUT = Layout(("conv", "bias"), ((20, 10, 3, 3), (20,)))
SEED = Config(seed=7).seed_for


def channel(values="fp32", owes=True, **selection):
    return Channel(LAYOUT, values, Pruning(**selection), 0, SEED, owes)


def vector(seed=0):
    return torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(seed))


SELECTIONS = {
    "none": {"method": "none"},
    "topk": {"method": "topk", "density": 0.1},
    "per layer": {"method": "topk", "density": 0.1, "scope": "layer"},
    "per chunk": {"method": "topk", "density": 0.1, "scope": "chunk", "chunk": 100},
    "random": {"method": "random", "density": 0.1},
    "random by layer": {"method": "random", "density": 0.1, "scope": "layer"},
    "threshold": {"method": "threshold", "threshold": 1.5},
    "relative threshold": {"method": "threshold", "threshold": 0.5, "relative": True},
}
MASKS = {"all": None, "masked": np.arange(0, LAYOUT.size, 3)}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("values", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_what_is_sent_is_what_arrives(selection, values, mask):
    link = channel(values, **SELECTIONS[selection])
    update = vector()
    link.use_mask(MASKS[mask])
    payload, sent = link.encode(update, round_number=3, client=5)
    arrived = link.decode(payload, round_number=3, client=5).dense()
    assert torch.equal(sent.dense(), arrived)
    if mask == "masked":
        outside = np.setdiff1d(np.arange(LAYOUT.size), link.mask)
        assert not arrived[outside].any()
    if values == "fp32":
        carried = arrived != 0
        assert torch.equal(arrived[carried], update[carried]) and carried.any()


def test_a_random_choice_costs_no_positions_and_both_ends_must_agree_on_it():
    link = channel(method="random", density=0.1)
    payload, sent = link.encode(vector(), round_number=1, client=2)
    assert len(sent.values) == 182 and len(payload) == OVERHEAD + 4 * 182
    for elsewhere in ((2, 2), (1, 3)):
        with pytest.raises(PayloadError, match="another layout"):
            link.decode(payload, *elsewhere)


def test_a_shared_random_choice_is_another_one_in_each_round_and_the_same_for_all_clients():
    link = channel(method="random", density=0.1, shared=True)
    support = [link.encode(vector(), *at)[1].indices for at in ((1, 2), (1, 3), (2, 2))]
    np.testing.assert_array_equal(support[0], support[1])
    assert not np.array_equal(support[0], support[2])
    payload, _ = link.encode(vector(), round_number=1, client=2)
    with pytest.raises(PayloadError, match="another layout"):
        link.decode(payload, 2, 2)


def test_each_client_writes_with_its_own_bits():
    link = Channel(LAYOUT, "eden(0.1)", Pruning(method="none"), 0, SEED, client_bits=[0.01, 0.5])
    sizes = []
    for client, word in enumerate(["eden(0.01)", "eden(0.5)", "eden(0.01)"]):
        payload, _ = link.encode(vector(), 1, client)
        plain = Channel(LAYOUT, word, Pruning(method="none"), 0, SEED)
        assert bytes(payload) == bytes(plain.encode(vector(), 1, client)[0])
        sizes.append(len(payload))
    assert sizes[1] > 3 * sizes[0]
    of_a_server = link.encode(vector(), 1, -2)[0]
    assert sizes[0] < len(of_a_server) < sizes[1]


def test_ends_with_different_masks_refuse_each_other():
    link = channel(method="none")
    link.use_mask(np.arange(100))
    payload, _ = link.encode(vector(), 1)
    link.use_mask(np.arange(1, 101))
    with pytest.raises(PayloadError, match="another layout"):
        link.decode(payload, 1)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_random_is_unbiased_without_error_feedback(scope):
    link, update = channel(method="random", density=0.25, scope=scope, owes=False), vector()
    draws = 2000
    total = sum(link.encode(update, round)[1].dense().double() for round in range(1, draws + 1))
    # One draw's variance is x^2 (1 / p - 1): at 1/4 the mean of 2,000 has a deviation of 0.039 x.
    inverse = torch.full((LAYOUT.size,), 4.0)
    if scope == "layer":
        sizes = LAYOUT.sizes
        counts = pruning.layer_counts(sizes, pruning.num_kept(0.25, LAYOUT.size))
        inverse = torch.from_numpy(np.repeat(sizes / counts, sizes))
    errors = (total / draws - update) / (update.abs() * ((inverse - 1) / draws).sqrt())
    errors = errors[inverse > 1]  # where a tensor travels whole there is none
    assert errors.abs().max() < 5 and errors.square().mean() == pytest.approx(1, abs=0.1)


def test_densities_follow_rounds_and_clients():
    link = channel(density=0.01, warmup=[0.25, 0.0625], client_densities=[0.02, 0.001])
    assert [link.density(round, 0) for round in (1, 2, 3, 4)] == [0.25, 0.0625, 0.02, 0.02]
    assert [link.density(9, client) for client in (0, 1, 2, 3)] == [0.02, 0.001, 0.02, 0.001]
    assert link.density(9, -2) == 0.01  # a server has none of its own
    assert channel(density=0.01).density(1, 3) == 0.01
    link = channel(density=0.01, warmup=[0.25, 0.0625], warmup_rounds=3)
    assert [link.density(round, 0) for round in (1, 3, 4, 6, 7)] == [0.25] * 2 + [0.0625] * 2 + [
        0.01
    ]


# --- what was not agreed on -----------------------------------------------------------------------

TWO_IN_A_TENSOR = Layout(("a", "b"), ((30,), (30,)))


def at(*positions):
    return lambda *_: np.array(positions, np.int64)


@pytest.mark.parametrize("agreed", ["fp32", "fp16", "int8", "qsgd4", "eden2"])
@pytest.mark.parametrize("method", ["none", "topk"])
def test_values_of_another_coder_are_refused(agreed, method):
    link = channel(agreed, method=method)
    for word in ["fp32", "bf16", "int4", "int8", "qsgd4", "eden1", "eden2", "powersgd(1)"]:
        if method == "topk" and word in ("powersgd(1)", "int4"):
            continue  # one takes no selection; of the other, coded levels do not say their bits
        payload, _ = channel(word, method=method).encode(vector(), 1)
        if word == agreed:
            link.decode(payload, 1)
        else:
            with pytest.raises(PayloadError):
                link.decode(payload, 1)


@pytest.mark.parametrize("scope", ["global", "layer", "chunk"])
def test_more_positions_than_were_agreed_on_are_refused(scope):
    """A tenth of 60 entries, of 30 and 30, or of chunks of 25, 25 and 10: 6, 3 + 3, 3 + 3 + 1."""
    settings = Pruning(method="topk", density=0.1, scope=scope, chunk=25)
    link, most = Channel(TWO_IN_A_TENSOR, "fp32", settings), {"global": 6, "layer": 6, "chunk": 7}
    ones = torch.ones(60)
    payload, _ = link.encode(ones, 1, select=at(*range(most[scope])))
    assert len(link.decode(payload, 1).values) == most[scope]
    payload, _ = link.encode(ones, 1, select=at(*range(most[scope] + 1)))
    with pytest.raises(PayloadError):
        link.decode(payload, 1)


@pytest.mark.parametrize("method", ["none", "random"])
def test_positions_are_refused_where_the_sender_picks_none(method):
    link = channel("fp32", method=method, density=0.3)
    payload, _ = link.encode(vector(), 1, select=at(0, 1, 2))
    with pytest.raises(PayloadError):
        link.decode(payload, 1)


def test_a_sender_that_picks_by_itself_may_pick_any_number():
    link = Channel(LAYOUT, "bf16", sender_picks=True)
    for count in (0, 1, LAYOUT.size):
        payload, _ = link.encode(torch.ones(LAYOUT.size), 1, select=at(*range(count)))
        assert int(link.decode(payload, 1).dense().sum()) == count


# --- error feedback -------------------------------------------------------------------------------


def feed(feedback, link, updates):
    """Send updates one after the other; return what arrived in all and the state at the end."""
    state, total = {}, torch.zeros(LAYOUT.size, dtype=torch.float64)
    for round, update in enumerate(updates, 1):
        owed = update.clone()
        after = feedback.add(owed, state)
        _, sent = link.encode(owed, round)
        state = feedback.subtract(owed, sent, after)
        total += sent.dense()
    return total, state


@pytest.mark.parametrize("values", ["fp32", "fp16", "int8"])
def test_what_arrived_and_what_is_owed_is_what_was_learned(values):
    updates = [vector(seed) for seed in range(20)]
    link = channel(values, method="topk", density=0.05)
    total, state = feed(ErrorFeedback(1.0, 0.0), link, updates)
    learned = sum(update.double() for update in updates)
    assert torch.allclose(total + state["residual"], learned, rtol=0, atol=1e-5)


def test_decay_forgets_by_its_factor():
    """Nothing is sent but the largest entry, so the rest is a geometric sum."""
    update = torch.zeros(LAYOUT.size)
    update[:2] = torch.tensor([100.0, 1.0])
    link = channel(method="topk", density=1e-9)
    _, state = feed(ErrorFeedback(0.5, 0.0), link, [update] * 3)
    assert state["residual"][:2].tolist() == [0.0, 1.75]


def test_momentum_correction_is_dgc_step_by_step():
    """u = m u + g; v += u; send the largest of v; u and v are zero there (numpy, float64)."""
    m, u, v = 0.9, np.zeros(LAYOUT.size), np.zeros(LAYOUT.size)
    link, feedback = channel(method="topk", density=0.05), ErrorFeedback(1.0, m)
    state = {}
    for round in range(1, 8):
        gradient = vector(round)
        u = m * u + gradient.double().numpy()
        v += u
        owed = gradient.clone()
        after = feedback.add(owed, state)
        _, sent = link.encode(owed, round)
        state = feedback.subtract(owed, sent, after)
        largest = np.argsort(-np.abs(v), kind="stable")[: len(sent.indices)]
        assert set(largest) == set(sent.indices)
        np.testing.assert_allclose(sent.dense().double()[largest], v[largest], rtol=1e-5)
        u[largest] = v[largest] = 0
        np.testing.assert_allclose(state["velocity"], u, atol=1e-5)
        np.testing.assert_allclose(state["residual"], v, atol=1e-5)


def test_biased_compression_stands_still_and_error_feedback_converges():
    """Two clients pull one coordinate apart, harder than both pull the other.

    f_i(x) = 10 s_i x_0 + (x_1 - 1)^2 / 2 with s = +1, -1: the mean has its minimum at x_1 = 1.
    Top-1 always sends the first coordinate, where the clients cancel, so x_1 never moves (the
    failure of Beznosikov et al. 2020, arXiv 2002.12410, example 1); with error feedback it does.
    """
    layout, lr = Layout(("x",), ((2,),)), 0.05
    link = Channel(layout, "fp32", Pruning(method="topk", density=0.5), 0, SEED)

    def train(feedback):
        x, states = torch.zeros(2), [{}, {}]
        for round in range(1, 1501):
            updates = []
            for client, sign in enumerate((1.0, -1.0)):
                owed = -lr * torch.tensor([10 * sign, float(x[1]) - 1])
                after = feedback.add(owed, states[client]) if feedback else {}
                _, sent = link.encode(owed, round, client)
                if feedback:
                    states[client] = feedback.subtract(owed, sent, after)
                updates.append(sent.dense())
            x = x + (updates[0] + updates[1]) / 2
        return x

    assert train(None).tolist() == [0.0, 0.0]
    assert train(ErrorFeedback(1.0, 0.0)).tolist() == pytest.approx([0.0, 1.0], abs=0.6)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_what_is_not_finite_is_refused_wherever_it_is(selection, number):
    """Also outside what travels: it would be owed, and stay in the residual for ever."""
    for mask in MASKS.values():
        link, update = channel(**SELECTIONS[selection]), vector()
        link.use_mask(mask)
        update[1] = number
        with pytest.raises(NotFinite):
            link.encode(update, 1)


# --- damping --------------------------------------------------------------------------------------


def rough(scale=1.0):
    """A vector of which a few values are large, where coders of few levels do worst."""
    return vector() * torch.exp(scale * vector(1))


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_what_is_owed_shrinks_on_average_whatever_the_coder(word, scale):
    link, update = channel(word, owes=True, method="none"), rough(scale)
    losses = [
        float((update - link.encode(update, number)[1].dense()).square().sum())
        for number in range(1, 21)
    ]
    assert np.mean(losses) < float(update.square().sum())


def test_only_an_expanding_coder_is_damped_and_only_where_what_is_lost_is_owed():
    update = rough(2.0)
    for word in WORDS:
        plain, owing = channel(word, owes=False, method="none"), channel(word, method="none")
        sent, damped = (link.encode(update, 1)[1].dense() for link in (plain, owing))
        if word in ("qsgd2", "qsgd4"):  # 1 and 7 levels, for buckets of 512 values
            levels = {"qsgd2": 1, "qsgd4": 7}[word]
            variance = ((1 + 511 / levels**2) ** 0.5 - 1) / 2
            ratios = damped[sent != 0] / sent[sent != 0]
            assert ratios.numpy() == pytest.approx(1 / (1 + variance), rel=1e-6) and variance > 1
        elif word.startswith("eden("):
            factor = np.float32(1 / (1 + parse_coder(word).variance))
            assert torch.equal(sent * factor, damped) and factor < 0.5
        else:
            assert torch.equal(sent, damped), word


@pytest.mark.parametrize("word", ["qsgd2", "qsgd4", "eden1", "sign", "ternary"])
def test_no_more_is_owed_than_a_few_updates(word):
    updates = [vector(seed) for seed in range(100)]
    _, state = feed(ErrorFeedback(1.0, 0.0), channel(word, method="none"), updates)
    assert state["residual"].norm() < 3 * updates[0].norm()  # qsgd2 undamped: 8.4
