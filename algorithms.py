"""Client algorithms: how local training departs from plain SGD, and what the server makes of it.

Each is one class with three hooks around a client's training and one on the server:

    before     the model has arrived: prepare, from what came with it and what the client kept
    gradient   correct the gradient of a batch, in place: after unscaling, before clipping
    after      the update is known: what the client keeps, and what it sends besides
    aggregate  the server turns the clients' averages into the update that its optimizer steps by

x, received, gradient, update, vector: float32 [num_parameters]; update = trained - received.
`reach` is how far a gradient of 1 in every step would have moved the weights, so -update / reach is
the mean gradient of the steps: lr * K of the papers, and more with momentum, which they do without.
"""

from collections.abc import Callable

import torch
from torch import Tensor

State = dict[str, Tensor]


def reach(lr: float, steps: int, momentum: float = 0.0, nesterov: bool = False) -> float:
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


class FedAvg:
    """Plain local SGD (McMahan et al. 2017, arXiv 1602.05629), and what the others start from."""

    down = ""  # the kind of message that brings the server's vector along with the model
    up = ""  # the kind of message that takes a vector along with the update
    has_vector = False  # the server holds a vector between rounds, at first zero

    def before(
        self,
        received: Tensor,
        state: State,  # what the client kept; empty at first
        vector: Tensor | None,  # what came down
        full_gradient: Callable[[], Tensor],  # over all its examples, at the received weights
    ) -> None:
        """All on the device of training."""

    def gradient(self, x: Tensor, gradient: Tensor) -> None:
        """x: the weights before this step."""

    def after(self, update: Tensor, reach: float) -> tuple[State, Tensor | None]:
        """Return what the client keeps and what it sends `up`; may rescale the update in place.

        Besides, a client keeps the sum of all that it sent up, under that kind's name.
        """
        return {}, None

    def aggregate(
        self,
        averages: dict[str, Tensor],  # of the update and of what came up, by kind
        vector: Tensor | None,
        share: float,  # of all clients' weight, the part that was averaged
        reach: float,  # the average of theirs
    ) -> None:
        """Move the averages and the server's vector on, in place."""


class FedProx(FedAvg):
    """A pull towards the received model (Li et al. 2020, arXiv 1812.06127, eq. 2).

    The loss gets mu / 2 * norm2(x - received)^2.
    """

    def __init__(self, mu: float = 0.01):
        self.mu = mu

    def before(self, received, state, vector, full_gradient):
        self.received = received

    def gradient(self, x, gradient):
        gradient.add_(x, alpha=self.mu).sub_(self.received, alpha=self.mu)


class SCAFFOLD(FedAvg):
    """Control variates c and c_i against client drift (Karimireddy et al. 2020, arXiv 1910.06378).

    Training uses gradient + c - c_i (Algorithm 1, line 10). Then c_i becomes, by option 1, the
    gradient over all of the client's examples at the received model or, by option 2, c_i - c -
    update / reach (line 12). What it changes by travels, and c moves by the average of that times
    the cohort's share of all clients (line 17). Where compression loses a part, c_i is what both
    ends know, the sum of what was sent, and the lost part belongs to the next change.
    """

    down = up = "control"
    has_vector = True

    def __init__(self, option: int = 2):
        self.option = option

    def before(self, received, state, vector, full_gradient):
        self.c, c_i = vector, state.get("control", torch.zeros_like(vector))
        self.correction = self.c - c_i
        if self.option == 1:
            self.change = full_gradient() - c_i

    def gradient(self, x, gradient):
        gradient.add_(self.correction)

    def after(self, update, reach):
        return {}, self.change if self.option == 1 else update.div(-reach).sub_(self.c)

    def aggregate(self, averages, vector, share, reach):
        vector.add_(averages["control"], alpha=share)


class FedNova(FedAvg):
    """Normalised averaging for unequal numbers of steps (Wang et al. 2020, arXiv 2007.07481).

    A client sends update / reach, its mean step (eq. 8), and the server moves by the average of
    those times the average reach (eq. 9 with tau_eff = sum of p_i * norm1(a_i)).
    """

    def after(self, update, reach):
        update.div_(reach)
        return {}, None

    def aggregate(self, averages, vector, share, reach):
        averages["update"].mul_(reach)


class FedDyn(FedAvg):
    """Dynamic regularisation (Acar et al. 2021, arXiv 2111.04263, Algorithm 1).

    Training uses gradient - g_i + alpha * (x - received); then g_i moves by -alpha * update. The
    server steps by the average update minus h / alpha, where h moves by -alpha times the average
    times the cohort's share: it holds -h / alpha, which is free of alpha. alpha = 0 is FedAvg.
    """

    has_vector = True

    def __init__(self, alpha: float = 0.01):
        self.alpha = alpha

    def before(self, received, state, vector, full_gradient):
        self.received = received
        self.g_i = state.get("linear", torch.zeros_like(received))

    def gradient(self, x, gradient):
        gradient.add_(x, alpha=self.alpha).sub_(self.received, alpha=self.alpha).sub_(self.g_i)

    def after(self, update, reach):
        return {"linear": self.g_i - self.alpha * update}, None

    def aggregate(self, averages, vector, share, reach):
        if self.alpha:
            vector.add_(averages["update"], alpha=share)
            averages["update"].add_(vector)


class FedCM(FedAvg):
    """Client-level momentum (Xu et al. 2021, arXiv 2106.10874, Algorithm 2).

    Training uses alpha * gradient + (1 - alpha) * Delta, where Delta is the mean gradient of the
    round before, -average update / reach, which comes down with the model. alpha = 1 is FedAvg.
    """

    down = "momentum"
    has_vector = True

    def __init__(self, alpha: float = 0.1):
        self.alpha = alpha

    def before(self, received, state, vector, full_gradient):
        self.momentum = vector

    def gradient(self, x, gradient):
        gradient.mul_(self.alpha).add_(self.momentum, alpha=1 - self.alpha)

    def aggregate(self, averages, vector, share, reach):
        torch.div(averages["update"], -reach, out=vector)


ALGORITHMS = {cls.__name__: cls for cls in (FedAvg, FedProx, SCAFFOLD, FedNova, FedDyn, FedCM)}
