"""Adaptive federated optimization: the server's step (Reddi et al. 2021, arXiv 2003.00295).

Each is a torch.optim.Optimizer over the one flat parameter vector, whose gradient is minus the
averaged update: with Delta = -gradient, Algorithm 2 of the paper reads

    m <- beta1 * m + (1 - beta1) * Delta
    v <- v + Delta^2                                    FedAdagrad
         v - (1 - beta2) * Delta^2 * sign(v - Delta^2)  FedYogi
         beta2 * v + (1 - beta2) * Delta^2              FedAdam
    x <- x + lr * m / (sqrt(v) + tau)

with tau outside the root, v starting at v0 >= tau^2 and no bias correction. Defaults are the
paper's. Google's code differs (v0 = 0, bias-corrected); `v0` and `bias_correction` reach it.
FedAMS divides by the root of the largest v so far. FedExP is FedAvg with a rate of its own.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer, lr_scheduler

from algorithms import check_settings, pick
from compiled import compiled


class FedAvg(SGD):
    """x <- x + lr * Delta (McMahan et al. 2017, arXiv 1602.05629, for lr = 1)."""

    def __init__(self, params: Any, lr: float = 1.0):
        super().__init__(params, lr=lr)


class FedAvgM(SGD):
    """Server momentum: u <- momentum * u + Delta; x <- x + lr * u (Hsu et al. 2019, 1909.06335)."""

    def __init__(self, params: Any, lr: float = 1.0, momentum: float = 0.9, nesterov: bool = False):
        super().__init__(params, lr=lr, momentum=momentum, nesterov=nesterov)


class FedExP(SGD):
    """x <- x + lr * Delta, extrapolated (Jhunjhunwala et al. 2023, arXiv 2301.09604):

        lr = max(1, mean_i ||Delta_i||^2 / (2 * (||Delta||^2 + eps)))

    Before each step, param_groups[0]["mean_squared_norm"] must be set to mean_i ||Delta_i||^2, a
    float: the mean over the clients that were averaged, weighted as their updates are. At 0, where
    it starts, the step is FedAvg's. After the step param_groups[0]["lr"] is the rate it took.

    eps: the authors' for CIFAR-10 (0.1 for EMNIST); their code also multiplies it by the size of
    the cohort and lets it decay with the clients' rate. The paper evaluates the average of the last
    two iterates; we evaluate the last.
    """

    steps_by_average = True  # it needs the average of the updates themselves
    reads_norms = True  # what compression adds to their norms, it would take for progress

    def __init__(self, params: Any, eps: float = 1e-3):
        super().__init__(params, lr=1.0)
        self.param_groups[0] |= dict(eps=eps, mean_squared_norm=0.0)

    def step(self, closure: None = None) -> None:
        group = self.param_groups[0]
        gradient = group["params"][0].grad
        if gradient is not None:
            norm = 2 * (_squared_norm(gradient) + group["eps"])
            group["lr"] = max(1.0, group["mean_squared_norm"] / norm)
        super().step()


def _squared_norm(vector: Tensor) -> float:
    """In blocks that torch gives to one thread: longer sums round with the number of threads."""
    norms = [torch.linalg.vector_norm(block) for block in vector.split(32767)]
    return float(torch.stack(norms).double().square().sum())


ADAGRAD, ADAM, AMS, YOGI = range(4)


@compiled
def _step_compiled(rule, x, gradient, m, v, v_max, decay1, decay2, lr, scale, tau):
    """Algorithm 2 in one loop that moves each byte once, in the precision of the vectors.

    All vectors are [n], but v_max is [0] unless the rule is AMS. decay1 = 1 - beta1,
    decay2 = 1 - beta2, scale corrects the bias of the root. m, a mean of gradients, is minus the
    paper's. Nothing is added across i, so no split of the loop changes a bit.
    """
    for i in range(len(x)):
        m[i] += decay1 * (gradient[i] - m[i])
        squared = gradient[i] * gradient[i]
        if rule == ADAGRAD:
            v[i] += squared
        elif rule == YOGI:
            v[i] -= decay2 * squared * np.sign(v[i] - squared)
        else:
            v[i] += decay2 * (squared - v[i])
        second = v[i]
        if rule == AMS:
            v_max[i] = second = max(v_max[i], v[i])
        x[i] -= lr * m[i] / (scale * math.sqrt(second) + tau)


def _step_in_torch(
    rule: int,
    x: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    v_max: Tensor,
    decay1: float,
    decay2: float,
    lr: float,
    scale: float,
    tau: float,
) -> None:
    """The same on other devices."""
    m.lerp_(gradient, decay1)
    squared = gradient.square()
    if rule == ADAGRAD:
        v.add_(squared)
    elif rule == YOGI:
        v.addcmul_(squared, torch.sign(v - squared), value=-decay2)
    else:
        v.lerp_(squared, decay2)
    second = v
    if rule == AMS:
        second = torch.maximum(v_max, v, out=v_max)
    x.addcdiv_(m, second.sqrt().mul_(scale).add_(tau), value=-lr)


class AdaptiveOptimizer(Optimizer):
    """The step that FedAdagrad, FedAdam, FedAMS and FedYogi share; float32 or float64 vectors."""

    rule: int  # for the second moment

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
        v0: float | None = None,  # None: tau^2
        bias_correction: bool = False,
    ):
        v0 = tau**2 if v0 is None else v0
        settings = dict(lr=lr, beta1=beta1, beta2=beta2, tau=tau, v0=v0)
        super().__init__(params, settings | dict(bias_correction=bias_correction))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    self._step_vector(x, x.grad, self.state[x], group)

    def _step_vector(self, x: Tensor, gradient: Tensor, state: dict, group: dict) -> None:
        if not state:
            state["step"] = 0
            state["m"] = torch.zeros_like(x)
            state |= self._second_moments(x, group["v0"])
        state["step"] += 1
        beta1, beta2, lr, scale = group["beta1"], group["beta2"], group["lr"], 1.0
        if group["bias_correction"]:
            lr /= 1 - beta1 ** state["step"]
            scale = (1 - beta2 ** state["step"]) ** -0.5
        vectors = [x, gradient, state["m"], state["v"], state.get("v_max", x[:0])]
        settings = [1 - beta1, 1 - beta2, lr, scale, group["tau"]]
        if x.device.type == "cpu":
            arrays = [vector.numpy() for vector in vectors]
            _step_compiled(self.rule, *arrays, *np.array(settings, arrays[0].dtype))
        else:
            _step_in_torch(self.rule, *vectors, *settings)

    def _second_moments(self, x: Tensor, v0: float) -> dict[str, Tensor]:
        return {"v": torch.full_like(x, v0)}

    def forget(self, positions: Tensor) -> None:
        """See forget() below: second moments begin at v0, and not at zero."""
        for group in self.param_groups:
            for x in group["params"]:
                fresh = self._second_moments(x, group["v0"]) | {"m": torch.zeros_like(x)}
                for name, vector in self.state[x].items():
                    if name in fresh:
                        vector[positions] = fresh[name][positions]


class FedAdagrad(AdaptiveOptimizer):
    """beta1 is 0, as in the paper's experiments: FedAdagrad is used without momentum."""

    rule = ADAGRAD

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        beta1: float = 0.0,
        tau: float = 1e-2,
        v0: float | None = None,
    ):
        super().__init__(params, lr=lr, beta1=beta1, tau=tau, v0=v0)


class FedAdam(AdaptiveOptimizer):
    rule = ADAM


class FedAMS(AdaptiveOptimizer):
    """FedAdam with max stabilization (Wang, Lin and Chen 2022, arXiv 2205.02719):

        v <- beta2 * v + (1 - beta2) * Delta^2, from 0
        v_max <- max(v_max, v), from v0
        x <- x + lr * m / (sqrt(v_max) + tau)

    The paper has v_max <- max(v_max, v, epsilon) and no tau. v_max never falls, so to start it at
    v0 = epsilon is the same: epsilon is under the root, in units of Delta^2, where tau is not.
    Defaults are those of the authors' code for CIFAR-10, but that it also corrects the bias.
    v0 = 0 and tau > 0 is AMSGrad, stabilized as FedAdam is.
    """

    rule = AMS

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 0.0,
        v0: float = 1e-3,
        bias_correction: bool = False,
    ):
        super().__init__(params, lr, beta1, beta2, tau, v0, bias_correction)

    def _second_moments(self, x: Tensor, v0: float) -> dict[str, Tensor]:
        return {"v": torch.zeros_like(x), "v_max": torch.full_like(x, v0)}


class FedYogi(AdaptiveOptimizer):
    rule = YOGI


OURS = {
    cls.__name__: cls for cls in (FedAvg, FedAvgM, FedExP, FedAdagrad, FedAdam, FedAMS, FedYogi)
}


def make_optimizer(name: str, parameter: Tensor, **settings: Any) -> Optimizer:
    """One of OURS, or any torch.optim optimizer, by class name.

    Raises ValueError, in one line, for a name that does not exist, a setting that this optimizer
    does not have, or an optimizer that cannot step a single flat vector.
    """
    theirs = _classes(torch.optim, Optimizer)
    cls = pick(name, OURS | {n: c for n, c in theirs.items() if n not in OURS}, "optimizer")
    try_optimizer(cls, settings)
    return cls([parameter], **settings)


def try_optimizer(cls: type[Optimizer], settings: dict[str, Any]) -> None:
    """Raise ValueError, in one line, unless a class of torch's kind steps by these settings.

    It is tried on three numbers: LBFGS wants a closure, Muon a matrix, options may clash.
    """
    check_settings(cls, settings, skip=2)
    try:
        trial = torch.nn.Parameter(torch.zeros(3))
        trial.grad = torch.zeros(3)
        cls([trial], **settings).step()
    except Exception as error:
        raise ValueError(f"{cls.__name__} cannot be used: {_first_line(error)}") from None


def check_local_optimizer(name: str, lr: float, options: dict[str, Any]) -> None:
    """Raise ValueError, in one line, for what torch.optim does not have or does not take."""
    cls = pick(name, _classes(torch.optim, Optimizer), "optimizer of torch.optim")
    if "lr" in options:
        raise ValueError("lr is local.lr, which a schedule may change")
    try_optimizer(cls, {"lr": lr} | options)


def make_scheduler(name: str, optimizer: Optimizer, **settings: Any) -> Any:
    """Any torch.optim.lr_scheduler by class name, to be stepped once a round.

    Raises ValueError as make_optimizer does, and for FedExP.
    """
    if isinstance(optimizer, FedExP):
        raise ValueError("FedExP sets its own learning rate and takes no scheduler")
    cls = pick(name, _classes(lr_scheduler, lr_scheduler.LRScheduler), "scheduler")
    check_settings(cls, settings, skip=2)
    try:  # on another optimizer first: some fail only when they are stepped, or want a metric
        trial = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        trial_scheduler = cls(trial, **settings)
        trial.step()
        trial_scheduler.step()
        return cls(optimizer, **settings)
    except Exception as error:
        raise ValueError(f"{name} cannot be used: {_first_line(error)}") from None


def forget(optimizer: Optimizer, positions: Tensor) -> None:
    """Let the coordinates at these positions, int64, begin anew: they have left the model.

    Otherwise a weight that grows back would move by the momentum from before it left.
    """
    if isinstance(optimizer, AdaptiveOptimizer):
        optimizer.forget(positions)
        return
    for x, state in optimizer.state.items():
        for vector in state.values():
            if isinstance(vector, Tensor) and vector.shape == x.shape:
                vector[positions] = 0.0


def _classes(module: Any, base: type) -> dict[str, type]:
    members = vars(module).items()
    return {n: c for n, c in members if isinstance(c, type) and issubclass(c, base) and c != base}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
