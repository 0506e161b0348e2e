"""Client algorithms: how local training departs from plain SGD, and what the server makes of it.

Each is one class with the settings and the server's part, and one class for the clients' part:

    before            the model has arrived: returns what belongs to one client in one round
    correct_gradient  corrects the gradient of a batch, in place: after unscaling, before clipping
    after_training    the update is known: what the client sends besides it
    after_sending     it is known what arrives: what the client keeps for its next round
    aggregate         the server turns the clients' averages into the update that its optimizer
                      steps by

update = trained - received weights. `step_length` is how far a gradient of 1 in every step would
have moved the weights, so -update / step_length is the mean gradient of the steps: it is lr * K of
the papers, and more with momentum, which they do without.

Vectors are float32 [num_parameters]. In training they lie on its device, in the memory layout of
the network (see FlatModel); what the client keeps is laid out as it travels, without gaps.
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


def step_length(lr: float, steps: int, momentum: float = 0.0, nesterov: bool = False) -> float:
    """lr times the 1-norm of FedNova's a (Wang et al. 2020, arXiv 2007.07481, section 4.2).

    A gradient after which s - 1 more steps follow moves the weights by lr * (1 + momentum + ... +
    momentum^(s - 1)); with Nesterov's momentum by one term more.
    """
    moved, power = (1.0, momentum) if nesterov else (0.0, 1.0)
    total = 0.0
    for _ in range(steps):
        moved += power
        power *= momentum
        total += moved
    return lr * total


class Arrived(Protocol):
    """What the receiver decoded of one message, on the device of training."""

    def add_to(self, vector: Tensor, weight: float = 1.0) -> None:
        """vector += weight * what arrived, in place."""

    def dense(self) -> Tensor:
        """What arrived as a whole vector, a new one."""


class LocalRound:
    """One client in one round of FedAvg: plain SGD, and nothing kept.

    What correct_gradient() reads and is not the same in a whole run is an attribute that is a
    tensor: a recorded step goes on with the next client's tensors in their place, see
    training/correction.py.
    """

    corrects = False  # whether correct_gradient() does anything

    @property
    def keeps(self) -> bool:
        """Whether the client keeps anything: whether after_sending() is the algorithm's own."""
        return type(self).after_sending is not LocalRound.after_sending

    def correct_gradient(self, weights: Tensor, gradient: Tensor) -> None:
        """Correct the gradient in place; weights are those before this step."""

    def after_training(self, update: Tensor, step_length: float) -> Tensor | None:
        """Return the vector to send besides the update, which may be rescaled in place."""
        return None

    def after_sending(self, kept: Tensor | None, arrived: dict[str, Arrived]) -> Tensor | None:
        """Return the vector that the client keeps, a new one.

        kept: what it kept before, which must not be written to; None means that it kept nothing.
        arrived: by kind of message, what the server will decode.
        """
        return None


class FedAvg:
    """Plain local SGD (McMahan et al. 2017, arXiv 1602.05629), and what the others start from."""

    down = ""  # the kind of message that brings the server's vector along with the model
    up = ""  # the kind of message that takes a vector along with the update
    has_vector = False  # whether the server holds a vector between rounds; it begins as zeros
    takes_full_gradient = False  # whether before() asks for it
    steps_by_average = True  # whether the server's optimizer steps by the average of the updates
    updates_vanish = False  # whether at the optimum each client's update is zero, not their mean
    divides_by_length = False  # whether -update / step_length is its mean gradient, as with SGD
    owes = False  # whether what compression loses of an update is part of the client's next one

    def before(
        self,
        received: Tensor,
        kept: Tensor | None,  # what after_sending() returned the last time; None the first time
        vector: Tensor | None,  # the server's, as it came down; None if none does
        full_gradient: Callable[[], Tensor],  # over all examples of the client, at `received`
    ) -> LocalRound:
        """Return what belongs to one client in one round."""
        return LocalRound()

    def aggregate(
        self,
        averages: dict[str, Tensor],  # of the update and of what came up, by kind
        vector: Tensor | None,
        share: float,  # the averaged clients' part of all clients' weight
        step_length: float,  # the average of the clients'
    ) -> None:
        """Move the averages and the server's vector on, in place."""


class FedProx(FedAvg):
    """A pull towards the received model (Li et al. 2020, arXiv 1812.06127, eq. 2).

    The loss gets mu / 2 * norm2(weights - received)^2. Raises ValueError for mu < 0.
    """

    def __init__(self, mu: float = 0.01):
        self.mu = at_least("mu", mu, 0)

    def before(self, received, kept, vector, full_gradient):
        return FedProxRound(self.mu, received)


class FedProxRound(LocalRound):
    corrects = True

    def __init__(self, mu: float, received: Tensor):
        self.mu, self.received = mu, received

    def correct_gradient(self, weights, gradient):
        gradient.add_(weights, alpha=self.mu).sub_(self.received, alpha=self.mu)


class SCAFFOLD(FedAvg):
    """Control variates c and c_i against client drift (Karimireddy et al. 2020, arXiv 1910.06378).

    Training uses gradient + c - c_i (Algorithm 1, line 10). Then c_i becomes, by option 1, the
    gradient over all of the client's examples at the received model or, by option 2, c_i - c -
    update / step_length (line 12). What it changes by travels, and c moves by the average of that
    times the cohort's share of all clients (line 17). Where compression loses a part, c_i is what
    both ends know, the sum of what arrived, and the lost part belongs to the next change.
    Raises ValueError for another option.
    """

    down = up = "control"
    has_vector = True
    updates_vanish = divides_by_length = True

    def __init__(self, option: int = 2):
        if option not in (1, 2):
            raise ValueError(f"option is {option!r}; it must be 1 or 2")
        self.takes_full_gradient = option == 1

    def before(self, received, kept, vector, full_gradient):
        c_i = torch.zeros_like(vector) if kept is None else kept
        return SCAFFOLDRound(vector, c_i, full_gradient() if self.takes_full_gradient else None)

    def aggregate(self, averages, vector, share, step_length):
        vector.add_(averages["control"], alpha=share)


class SCAFFOLDRound(LocalRound):
    corrects = True

    def __init__(self, c: Tensor, c_i: Tensor, full_gradient: Tensor | None):
        self.c, self.correction = c, c - c_i
        self.change = None if full_gradient is None else full_gradient - c_i

    def correct_gradient(self, weights, gradient):
        gradient.add_(self.correction)

    def after_training(self, update, step_length):
        return update.div(-step_length).sub_(self.c) if self.change is None else self.change

    def after_sending(self, kept, arrived):
        return plus(kept, arrived["control"])


class FedNova(FedAvg):
    """Normalised averaging for unequal numbers of steps (Wang et al. 2020, arXiv 2007.07481).

    A client sends update / step_length, its mean step (eq. 8), and the server moves by the average
    of those times the average step_length (eq. 9 with tau_eff = sum of p_i * norm1(a_i)).
    """

    steps_by_average = False
    divides_by_length = True

    def before(self, received, kept, vector, full_gradient):
        return FedNovaRound()

    def aggregate(self, averages, vector, share, step_length):
        averages["update"].mul_(step_length)


class FedNovaRound(LocalRound):
    def after_training(self, update, step_length):
        update.div_(step_length)


class FedDyn(FedAvg):
    """Dynamic regularisation (Acar et al. 2021, arXiv 2111.04263, Algorithm 1).

    Training uses gradient - g_i + alpha * (weights - received); then g_i moves by -alpha * update.
    The server steps by the average update minus h / alpha, where h moves by -alpha times the
    average times the cohort's share: it holds -h / alpha, which is free of alpha. Both move by the
    update that arrived, so that h stays the mean of all g_i under any compression. What was lost
    still pulls in the next round, because g_i does not have it yet. Error feedback would add it a
    second time, rounds late, and h, which sums all updates, would swing ever wider (measured in
    tests/test_quadratics.py). alpha = 0 is FedAvg. Raises ValueError for alpha < 0.
    """

    has_vector = True
    steps_by_average = False
    updates_vanish = owes = True

    def __init__(self, alpha: float = 0.01):
        self.alpha = at_least("alpha", alpha, 0)

    def before(self, received, kept, vector, full_gradient):
        g_i = torch.zeros_like(received) if kept is None else kept
        return FedDynRound(self.alpha, received, g_i)

    def aggregate(self, averages, vector, share, step_length):
        if self.alpha:
            vector.add_(averages["update"], alpha=share)
            averages["update"].add_(vector)


class FedDynRound(LocalRound):
    corrects = True

    def __init__(self, alpha: float, received: Tensor, g_i: Tensor):
        self.alpha, self.received, self.g_i = alpha, received, g_i

    def correct_gradient(self, weights, gradient):
        gradient.add_(weights, alpha=self.alpha).sub_(self.received, alpha=self.alpha)
        gradient.sub_(self.g_i)

    def after_sending(self, kept, arrived):
        return plus(kept, arrived["update"], -self.alpha)


class FedCM(FedAvg):
    """Client-level momentum (Xu et al. 2021, arXiv 2106.10874, Algorithm 2).

    Training uses alpha * gradient + (1 - alpha) * Delta, where Delta is the mean gradient of the
    round before, -average update / step_length, which comes down with the model. alpha = 1 is
    FedAvg. Raises ValueError unless 0 < alpha <= 1.
    """

    down = "momentum"
    has_vector = divides_by_length = True

    def __init__(self, alpha: float = 0.1):
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha is {alpha!r}; it must be above 0 and at most 1")
        self.alpha = alpha

    def before(self, received, kept, vector, full_gradient):
        return FedCMRound(self.alpha, vector)

    def aggregate(self, averages, vector, share, step_length):
        torch.div(averages["update"], -step_length, out=vector)


class FedCMRound(LocalRound):
    corrects = True

    def __init__(self, alpha: float, momentum: Tensor):
        self.alpha, self.momentum = alpha, momentum

    def correct_gradient(self, weights, gradient):
        gradient.mul_(self.alpha).add_(self.momentum, alpha=1 - self.alpha)


ALGORITHMS = {cls.__name__: cls for cls in (FedAvg, FedProx, SCAFFOLD, FedNova, FedDyn, FedCM)}


def make_algorithm(name: str, **settings: Any) -> FedAvg:
    """The algorithm of that class name.

    Raises ValueError, in one line, for a name that does not exist, a setting that this algorithm
    does not have, or a value that it does not take.
    """
    cls = pick(name, ALGORITHMS, "algorithm")
    check_settings(cls, settings)
    return cls(**settings)


def pick(name: str, choices: dict[str, type], what: str) -> type:
    """The choice of that name. Raises ValueError with the nearest name there is."""
    if name not in choices:
        lower = {choice.lower(): choice for choice in choices}
        near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.3)
        hint = f"did you mean {lower[near[0]]!r}?" if near else f"such as {next(iter(choices))}"
        raise ValueError(f"no {what} is called {name!r}; {hint}")
    return choices[name]


def check_settings(cls: type, settings: dict[str, Any], skip: int = 1) -> None:
    """Raise ValueError for a setting that the class does not take; skip: arguments not settings."""
    known = list(inspect.signature(cls.__init__).parameters)[skip:]
    if cls.__init__ is object.__init__:
        known = []
    for key in settings:
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{cls.__name__} has no setting {key!r}; {has}")


def at_least(name: str, value: Any, low: float) -> float:
    """The value. Raises ValueError unless it is a number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= low:
        raise ValueError(f"{name} is {value!r}; it must be a number of at least {low}")
    return value


def plus(kept: Tensor | None, arrived: Arrived, weight: float = 1.0) -> Tensor:
    """kept + weight * arrived, a new vector; None counts as zeros."""
    if kept is None:
        return arrived.dense().mul_(weight)
    total = kept.clone()
    arrived.add_to(total, weight)
    return total
