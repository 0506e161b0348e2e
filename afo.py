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
"""

import difflib
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer, lr_scheduler


class FedAvg(SGD):
    """x <- x + lr * Delta (McMahan et al. 2017, arXiv 1602.05629, for lr = 1)."""

    def __init__(self, params: Any, lr: float = 1.0):
        super().__init__(params, lr=lr)


class FedAvgM(SGD):
    """Server momentum: u <- momentum * u + Delta; x <- x + lr * u (Hsu et al. 2019, 1909.06335)."""

    def __init__(self, params: Any, lr: float = 1.0, momentum: float = 0.9, nesterov: bool = False):
        super().__init__(params, lr=lr, momentum=momentum, nesterov=nesterov)


class AdaptiveOptimizer(Optimizer):
    """The step that FedAdagrad, FedAdam and FedYogi share; each brings its own second moment."""

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

    @staticmethod
    def update_second_moment(v: Tensor, squared: Tensor, beta2: float) -> None:
        """Move v on, in place, by squared = Delta^2."""
        raise NotImplementedError

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
            state["v"] = torch.full_like(x, group["v0"])
        m, v, beta1, beta2 = state["m"], state["v"], group["beta1"], group["beta2"]
        state["step"] += 1
        m.lerp_(gradient, 1 - beta1)  # the mean of gradients: minus the paper's m
        self.update_second_moment(v, gradient.square(), beta2)
        lr, root = group["lr"], v.sqrt()
        if group["bias_correction"]:
            lr = lr / (1 - beta1 ** state["step"])
            root.div_((1 - beta2 ** state["step"]) ** 0.5)
        x.addcdiv_(m, root.add_(group["tau"]), value=-lr)


class FedAdagrad(AdaptiveOptimizer):
    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        beta1: float = 0.9,
        tau: float = 1e-2,
        v0: float | None = None,
    ):
        super().__init__(params, lr=lr, beta1=beta1, tau=tau, v0=v0)

    @staticmethod
    def update_second_moment(v: Tensor, squared: Tensor, beta2: float) -> None:
        v.add_(squared)


class FedAdam(AdaptiveOptimizer):
    @staticmethod
    def update_second_moment(v: Tensor, squared: Tensor, beta2: float) -> None:
        v.lerp_(squared, 1 - beta2)


class FedYogi(AdaptiveOptimizer):
    @staticmethod
    def update_second_moment(v: Tensor, squared: Tensor, beta2: float) -> None:
        v.addcmul_(squared, torch.sign(v - squared), value=beta2 - 1)


OURS = {cls.__name__: cls for cls in (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi)}


def make_optimizer(name: str, parameter: Tensor, **settings: Any) -> Optimizer:
    """One of OURS, or any torch.optim optimizer, by class name.

    Raises ValueError, in one line, for a name that does not exist, a setting that this optimizer
    does not have, or an optimizer that cannot step a single flat vector.
    """
    theirs = _classes(torch.optim, Optimizer)
    cls = _pick(name, OURS | {n: c for n, c in theirs.items() if n not in OURS}, "optimizer")
    _check_settings(cls, settings)
    try:  # on three numbers first: LBFGS wants a closure, Muon a matrix, options may clash
        trial = torch.nn.Parameter(torch.zeros(3))
        trial.grad = torch.zeros(3)
        cls([trial], **settings).step()
    except Exception as error:
        raise ValueError(f"{name} cannot be used: {_first_line(error)}") from None
    return cls([parameter], **settings)


def make_scheduler(name: str, optimizer: Optimizer, **settings: Any) -> Any:
    """Any torch.optim.lr_scheduler by class name, to be stepped once a round.

    Raises ValueError as make_optimizer does.
    """
    cls = _pick(name, _classes(lr_scheduler, lr_scheduler.LRScheduler), "scheduler")
    _check_settings(cls, settings)
    try:  # on another optimizer first: some fail only when they are stepped, or want a metric
        trial = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        trial_scheduler = cls(trial, **settings)
        trial.step()
        trial_scheduler.step()
        return cls(optimizer, **settings)
    except Exception as error:
        raise ValueError(f"{name} cannot be used: {_first_line(error)}") from None


def _classes(module: Any, base: type) -> dict[str, type]:
    members = vars(module).items()
    return {n: c for n, c in members if isinstance(c, type) and issubclass(c, base) and c != base}


def _pick(name: str, choices: dict[str, type], what: str) -> type:
    if name not in choices:
        lower = {choice.lower(): choice for choice in choices}
        near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.3)
        hint = f"did you mean {lower[near[0]]!r}?" if near else f"such as {next(iter(choices))}"
        raise ValueError(f"no {what} is called {name!r}; {hint}")
    return choices[name]


def _check_settings(cls: type, settings: dict[str, Any]) -> None:
    known = list(inspect.signature(cls.__init__).parameters)[2:]
    for key in settings:
        if key not in known:
            raise ValueError(f"{cls.__name__} has no setting {key!r}; it has {', '.join(known)}")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
