"""Where each algorithm ends with each coder, on losses whose optimum is known in closed form.

Three clients with f_i(x) = sum_j a_ij (x_j - g_ij)^2 / 2 take a few exact gradient steps a round,
all of them in each round. The page docs/algorithms.md has the table of where they end, which
`PYTHONPATH=. python tests/test_quadratics.py` prints.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.vectors import flat, noise
from torch import nn

from afo import make_optimizer
from algorithms import ALGORITHMS, make_algorithm, step_length
from compression import Decoded
from config import Config, Local, Pruning, Server, Uplink
from distributed import Team
from federation.agreement import Agreement
from federation.channel import ErrorFeedback
from federation.compatibility import contradictions
from layout import Layout
from training.engines import TorchEngine
from training.flat_model import FlatModel

PAGE = Path(__file__).parent.parent / "docs" / "algorithms.md"
LAYOUT, NO_BUFFERS = Layout(("matrix",), ((4, 8),)), Layout((), ())
LR, STEPS = 0.2, (2, 3, 4)  # of the three clients
OPTIONS = {"FedProx": {"mu": 0.5}, "FedDyn": {"alpha": 1.0}, "FedCM": {"alpha": 0.5}}

CODERS = ["fp32", "bf16", "int8", "int4", "qsgd2", "qsgd4", "qsgd8", "ternary", "means2"]
CODERS += ["sign", "eden1", "eden2", "bounded(0.01)", "powersgd(1)"]
WHOLE = Pruning(method="none")
TOPK, RANDOM = Pruning(method="topk", density=0.1), Pruning(method="random", density=0.3)
ROWS = {word: (word, WHOLE) for word in CODERS}
ROWS |= {"top-k 10%, int8": ("int8", TOPK), "random 30%, fp32": ("fp32", RANDOM)}
MOST_ROUNDS, FIRST, LAST = 800, 60, 160  # iterates FIRST to LAST are averaged
EXACT, NEAR, AROUND = 1e-4, 0.1, 0.3  # see where_it_ends()


class Quadratics:
    """Curvatures a and goals g, float64 [clients, size], and their optima."""

    def __init__(self, size: int, weight_decay: float = 0.0):
        rng = np.random.default_rng(1)
        self.a, self.g = rng.uniform(0.5, 1.5, (3, size)), rng.normal(0, 1, (3, size))
        self.weight_decay = weight_decay
        h, pull = self.a + weight_decay, self.a * self.g
        self._linear = [torch.from_numpy(array).float() for array in (h, pull)]

    def gradient(self, client: int, x: torch.Tensor) -> torch.Tensor:
        h, pull = self._linear
        return h[client] * x - pull[client]

    def optimum(self) -> np.ndarray:
        """Of the clients' mean loss."""
        return (self.a * self.g).sum(0) / (self.a + self.weight_decay).sum(0)

    def fixed_point(self, name: str) -> np.ndarray:
        """Where an algorithm stays without compression, by hand.

        K steps of rate lr on a loss of curvature h shrink the distance to its optimum by
        (1 - lr h)^K, so that a client moves by (1 - (1 - lr h)^K) / h times minus the gradient at
        the received model. The fixed point is where the mean of these is zero.
        """
        if name in ("SCAFFOLD", "FedDyn"):
            return self.optimum()
        mu = OPTIONS["FedProx"]["mu"] if name == "FedProx" else 0.0
        lr = LR * OPTIONS["FedCM"]["alpha"] if name == "FedCM" else LR
        steps = np.array(STEPS)[:, None]
        h = self.a + self.weight_decay + mu
        moved = (1 - (1 - lr * h) ** steps) / h
        if name == "FedNova":
            moved /= steps
        return (moved * self.a * self.g).sum(0) / (moved * (self.a + self.weight_decay)).sum(0)


def iterates(config: Config, layout: Layout, losses: Quadratics) -> Iterator[np.ndarray]:
    """The model after each round, by the parts of which a real run consists."""
    agreement = Agreement(config, layout, NO_BUFFERS)
    algorithm = agreement.algorithm
    feedback = ErrorFeedback(1.0, 0.0) if config.uplink.error_feedback else None
    x = nn.Parameter(torch.zeros(layout.size))
    optimizer = make_optimizer("FedAvg", x)
    vector = torch.zeros(layout.size) if algorithm.has_vector else None
    lengths = [step_length(LR, steps) for steps in STEPS]
    kept, states = [None] * len(STEPS), [{} for _ in STEPS]
    for round_number in range(1, MOST_ROUNDS + 1):
        received, averages = x.detach().clone(), {}
        for i, steps in enumerate(STEPS):
            y, full_gradient = received.clone(), partial(losses.gradient, i, received)
            local = algorithm.before(received, kept[i], vector, full_gradient)
            for _ in range(steps):
                gradient = losses.gradient(i, y)
                local.correct_gradient(y, gradient)
                y -= LR * gradient
            update = y - received
            besides = local.after_training(update, lengths[i])
            after = feedback.add(update, states[i]) if feedback else {}
            arrived = {"update": send(agreement, "update", update, round_number, i)}
            if feedback:
                states[i] = feedback.subtract(update, arrived["update"], after)
            if besides is not None:
                arrived[algorithm.up] = send(agreement, algorithm.up, besides, round_number, i)
            kept[i] = local.after_sending(kept[i], arrived)
            for kind, part in arrived.items():
                part.add_to(averages.setdefault(kind, torch.zeros(layout.size)), 1 / len(STEPS))
        algorithm.aggregate(averages, vector, 1.0, sum(lengths) / len(lengths))
        x.grad = -averages["update"]
        optimizer.step()
        yield x.detach().double().numpy().copy()


def send(agreement: Agreement, kind: str, vector: torch.Tensor, round_number: int, client: int):
    """What the server decodes of a client's vector."""
    channel = agreement.channel("up", kind)
    payload, _ = channel.encode(vector, round_number, client)
    return channel.decode(payload, round_number, client)


def make_config(name: str, values="fp32", pruning=WHOLE, error_feedback=False) -> Config:
    local = Local(algorithm=name, options=OPTIONS.get(name, {}))
    uplink = Uplink(values=values, error_feedback=error_feedback)
    return Config(local=local, pruning=pruning, uplink=uplink)


def where_it_ends(config: Config, size: int = LAYOUT.size, layout: Layout = LAYOUT) -> str:
    """In a word. All distances are in units of the right point's own norm.

    exact: the model itself is at the right point. around: single models are off, but the mean of
    many is not, since it is far nearer than they are. near: it settles beside the right point, by
    less than a tenth. biased: beside it by more. diverges: it leaves.
    """
    losses = Quadratics(size)
    right = losses.fixed_point(config.local.algorithm)
    off, norm = [], np.linalg.norm(right)
    for x in iterates(config, layout, losses):
        off.append((x - right) / norm)
        distance = np.linalg.norm(off[-1])
        if distance < EXACT:
            return "exact"
        if not distance < 10:
            return "diverges"
        if len(off) == LAST and not make_algorithm(config.local.algorithm).updates_vanish:
            break
    some = np.array(off[FIRST:])
    mean, typical = np.linalg.norm(some.mean(0)), np.sqrt(np.square(some).sum(1).mean())
    if mean < AROUND * typical:
        return "around"
    return "near" if mean < NEAR else "biased"


@cache
def cell(row: str, error_feedback: bool, name: str) -> str:
    config = make_config(name, *ROWS[row], error_feedback)
    return "refused" if list(contradictions(config)) else where_it_ends(config)


@cache
def table() -> str:
    """In Markdown: the algorithms side by side, each coder with and without error feedback."""
    head = ["update travels as", "error feedback", *ALGORITHMS]
    lines = [head, ["---"] * len(head)]
    for row in ROWS:
        for error_feedback in (True, False):
            if row == "fp32" and error_feedback:
                continue  # nothing is lost, so nothing is owed
            words = [cell(row, error_feedback, name) for name in ALGORITHMS]
            lines.append([f"`{row}`" if row in CODERS else row, "yes" if error_feedback else "no"])
            lines[-1] += words
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- the table ------------------------------------------------------------------------------------


def test_the_page_has_the_table_as_it_is_now():
    [found] = re.findall(
        r"(?:^\| update travels as .*\n)(?:^\|.*\n)+", PAGE.read_text("utf-8"), re.M
    )
    assert found.strip() == table()
    assert "diverges" not in found


def test_only_top_k_without_error_feedback_ends_far_off_without_being_refused():
    """It is let pass because it is what error feedback is compared with."""
    far_off = [line for line in table().splitlines() if "biased" in line]
    assert [line.split(" | ")[:2] for line in far_off] == [["| top-k 10%, int8", "no"]]


@pytest.mark.parametrize("name", ["SCAFFOLD", "FedDyn"])
def test_where_all_updates_vanish_nothing_is_lost_in_the_end(name):
    for row in ROWS:
        assert cell(row, False, name) == "exact", row


@pytest.mark.parametrize("name", ALGORITHMS)
def test_without_compression_each_ends_at_its_fixed_point_with_weight_decay_too(name):
    losses = Quadratics(LAYOUT.size, weight_decay=0.05)
    *_, x = iterates(make_config(name), LAYOUT, losses)
    np.testing.assert_allclose(x, losses.fixed_point(name), atol=2e-6)


@pytest.mark.parametrize(
    "values", ["sign", "ternary", "means2", "int2", "powersgd(1)", "bounded(0.3)"]
)
def test_what_errs_alike_each_time_is_refused_without_error_feedback_for_good_reason(values):
    config = make_config("FedAvg", values)
    [(key, message)] = contradictions(config)
    assert key == "uplink.error_feedback" and values in message and "FedAvg" in message
    assert where_it_ends(config) == "biased"
    assert not list(contradictions(make_config("FedAvg", values, error_feedback=True)))


@pytest.mark.parametrize("row", ["sign", "qsgd2", "eden1", "powersgd(1)", "top-k 10%, int8"])
def test_feddyn_with_error_feedback_is_refused_for_good_reason(row):
    config = make_config("FedDyn", *ROWS[row], error_feedback=True)
    [(key, message)] = contradictions(config)
    lost = "topk" if "top-k" in row else row
    assert key == "uplink.error_feedback" and lost in message and "FedDyn" in message
    assert where_it_ends(config) == "diverges"


def test_feddyn_owes_what_was_lost_so_a_random_choice_is_not_scaled_up():
    """Scaled by 1 / density, which keeps the mean, it diverged: h sums up what it overshoots."""
    assert where_it_ends(make_config("FedDyn", *ROWS["random 30%, fp32"])) == "exact"


@pytest.mark.parametrize(("name", "values"), [("FedDyn", "eden1"), ("SCAFFOLD", "qsgd2")])
def test_they_end_at_the_optimum_in_many_dimensions_too(name, values):
    """A bucket of qsgd is 512 values, and the more there are, the larger is the noise."""
    layout = Layout(("matrix",), ((64, 16),))
    assert where_it_ends(make_config(name, values), layout.size, layout) == "exact"


# --- weight decay, and FedExP ---------------------------------------------------------------------


class OneWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return images * self.weight


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in ("FedAvg", "FedProx", "SCAFFOLD", "FedNova"))]
    + [(name, {"alpha": alpha}) for name in ("FedDyn", "FedCM") for alpha in (0.1, 0.5, 1.0)],
)
def test_weight_decay_counts_once_in_the_engine(name, options):
    """(x - 1)^2 / 2 with a decay of 0.05 has its minimum at 1 / 1.05, for every alpha.

    It is the mean of two clients' losses, with goals 0 and 2. FedCM's decay would count 1 / alpha
    times if it were added after the correction.
    """
    algorithm, model = make_algorithm(name, **options), FlatModel(OneWeight(), torch.device("cpu"))
    engine = TorchEngine(model, Local(momentum=0.0, weight_decay=0.05), "fp32", Team())
    x, kept = torch.zeros(1), [None, None]
    vector = torch.zeros(1) if algorithm.has_vector else None
    for _ in range(300):
        averages = {}
        for i, goal in enumerate((0.0, 2.0)):
            model.load(x)
            local = algorithm.before(model.aligned(x), kept[i], vector, None)
            engine.begin(0.3, local.correct_gradient if local.corrects else None)
            for _ in range(2):
                loss = (engine.forward(torch.ones(1)) - goal).square().sum() / 2
                engine.backward(loss)
                engine.step()
            engine.end()
            update = model.read_parameters() - x
            besides = local.after_training(update, step_length(0.3, 2))
            sent = {"update": update} | ({} if besides is None else {algorithm.up: besides})
            arrived = {kind: Decoded(1, None, v.numpy().copy()) for kind, v in sent.items()}
            kept[i] = local.after_sending(kept[i], arrived)
            for kind, part in arrived.items():
                part.add_to(averages.setdefault(kind, torch.zeros(1)), 0.5)
        algorithm.aggregate(averages, vector, 1.0, step_length(0.3, 2))
        x = x + averages["update"]
    assert x.item() == pytest.approx(1 / 1.05, abs=1e-4)


def test_fedexp_takes_no_noise_for_progress():
    """With equal updates its rate is 1; qsgd2's noise would make it more, and is refused."""
    config = replace(make_config("FedAvg"), server=Server(optimizer="FedExP"))
    assert not list(contradictions(config))
    noisy = replace(config, uplink=replace(config.uplink, values="qsgd2"))
    [(key, message)] = contradictions(noisy)
    assert key == "server.optimizer" and "FedExP" in message and "qsgd2" in message

    def rate(values: str) -> float:
        """The rate of one step after twenty clients learned the same."""
        agreement = Agreement(make_config("FedAvg", values), flat(512), NO_BUFFERS)
        update = noise(512)
        arrived = [send(agreement, "update", update, 1, client).dense() for client in range(20)]
        x = nn.Parameter(torch.zeros(512))
        x.grad, optimizer = -sum(arrived) / 20, make_optimizer("FedExP", x)
        norm = sum(float(v.square().sum()) for v in arrived) / 20
        optimizer.param_groups[0]["mean_squared_norm"] = norm
        optimizer.step()
        return optimizer.param_groups[0]["lr"]

    assert rate("fp32") == 1.0
    assert rate("qsgd2") > 1.0


if __name__ == "__main__":
    print(table())
