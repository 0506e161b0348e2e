"""DeepSpeed as the engine that trains clients (Rasley et al. 2020; ZeRO: arXiv 1910.02054).

One engine serves all clients of a rank. Parameters stay float32 in every precision (torch.autocast
inside DeepSpeed), so the network trains in the flat vectors of a FlatModel. ZeRO's stages 1 and 2
step a vector of their own, without gaps, which is copied to the FlatModel after every step.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from config import Config, Local
from distributed import Team
from training.deepspeed_file import read_config
from training.engines import (
    FIRST_SCALE_POWER,
    CorrectGradient,
    Engine,
    autocast,
    clip_gradient,
    make_optimizer,
)
from training.flat_model import FlatModel

AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


class Groups:
    """Which ranks train a client together, with the methods that DeepSpeed asks of its `mpu`."""

    def __init__(self, ranks_per_client: int):
        self.size = ranks_per_client
        self.data, _ = dist.new_subgroups(ranks_per_client)
        self.model, _ = dist.new_subgroups(1)  # each rank alone: there is no tensor parallelism

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data

    def get_data_parallel_world_size(self) -> int:
        return self.size

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.model

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


class DeepSpeedEngine(Engine):
    """An engine whose steps are DeepSpeed's."""

    def __init__(
        self,
        model: FlatModel,
        config: Config,
        precision: str,  # fp32, bf16, fp16
        team: Team,
        folder: Path,  # for DeepSpeed's logs
    ):
        local, given = config.local, read_config(config)
        self.model, self.team, self.clip, self.precision = model, team, local.clip, precision
        self.weight_decay = local.weight_decay
        self.stage = given.get("zero_optimization", {}).get("stage", 0)
        power = given.get("fp16", {}).get("initial_scale_power", FIRST_SCALE_POWER)
        self.first_scale = 2.0**power
        self.tensors = list(model.network.parameters())
        self.parameter_views = model.views(model.parameters)
        self.gradient_views = model.views(model.gradients)
        self.sgd = make_optimizer(self.tensors, local)
        if self.stage:
            model.network.zero_grad(set_to_none=True)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model.network,
            optimizer=self.sgd,
            config=resolve(given, local, precision),
            mpu=Groups(team.size),
        )
        self.engine.enable_backward_allreduce = self.stage > 0 or team.size > 1
        if self.stage:
            self.zero_vector = self.optimizer.bit16_groups_flat[0][: model.layout.size]
            self._take_parameters_back()
        else:  # the norm of the vector rather than of its tensors' norms, as in TorchEngine
            self.engine.clip_fp32_gradients = lambda: clip_gradient(model, local.clip)
        owner, name = self.engine, "torch_autocast_z0_gradscaler"
        if self.stage:
            owner, name = self.optimizer, "torch_autocast_gradscaler"
        self.scaler = getattr(owner, name) if precision == "fp16" else None
        self.logs = EngineLogs(given, folder)

    def begin(self, lr: float, correct_gradient: CorrectGradient | None) -> None:
        self.correct_gradient = correct_gradient
        # As in TorchEngine: decay, correct, clip, momentum.
        self.decay = self.weight_decay if correct_gradient or self.clip else 0.0
        for group in self.sgd.param_groups:
            group["lr"], group["weight_decay"] = lr, self.weight_decay - self.decay
            for parameter in group["params"] if group["momentum"] else ():
                # Fused SGD would leave the momentum uninitialised if fp16 overflows at first.
                self.sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        if self.stage:
            self.zero_vector.copy_(self.model.read_parameters())
            self.optimizer.refresh_fp32_params()
        if self.scaler:
            scale = {"scale": self.first_scale, "growth_factor": 2.0, "backoff_factor": 0.5}
            self.scaler.load_state_dict(scale | {"growth_interval": 2000, "_growth_tracker": 0})

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [B, num_classes]: DeepSpeed's autocast ends with the network."""
        self.model.gradients.zero_()
        with autocast(self.model.device, self.precision):  # for fp16 on a CPU, which is ours
            return self.engine(images).float()

    def backward(self, loss: Tensor) -> None:
        """Compute the batch's gradient. DeepSpeed averages those of a team; a batch's is a sum."""
        self.engine.backward(loss * self.team.size)

    def step(self) -> int:
        scale = self.scaler.get_scale() if self.scaler else 1.0
        if self.correct_gradient or self.decay:
            self._correct(scale)
        if self.stage and self.scaler:  # ZeRO compares the clip with the scaled norm
            self.optimizer.clip_grad = self.clip * scale
        with self.logs.quiet_step():
            self.engine.step()
        if self.stage:
            self._take_parameters_back()
        else:  # DeepSpeed took .grad away
            for tensor, view in zip(self.tensors, self.gradient_views, strict=True):
                tensor.grad = view
        if not self.scaler:
            return 0
        if self.stage and not self.engine.was_step_applied():  # ZeRO skips, and keeps the scale
            self.scaler.update(scale * self.scaler.get_backoff_factor())
        return int(self.scaler.get_scale() < scale)

    def end(self) -> None:
        """Write down what DeepSpeed logged of this client."""
        self.logs.end_client()

    def _take_parameters_back(self) -> None:
        """Copy ZeRO's parameters to the FlatModel's vector, and let the network use that again.

        ZeRO lets the network's tensors be views of its own vector, where they start at any address.
        """
        for tensor, view in zip(self.tensors, self.parameter_views, strict=True):
            tensor.data = view.copy_(tensor.data)

    def _correct(self, scale: float) -> None:
        """Decay and correct the gradient without fp16's scale.

        Under ZeRO each rank has a part of the gradient.
        """
        gradients = self.model.gradients
        if self.stage:
            for tensor, view in zip(self.tensors, self.gradient_views, strict=True):
                view.copy_(deepspeed.utils.safe_get_full_grad(tensor))
        gradients.div_(scale)  # a power of two: exact both ways
        gradients.add_(self.model.parameters, alpha=self.decay)
        if self.correct_gradient:
            self.correct_gradient(self.model.parameters, gradients)
        gradients.mul_(scale)
        if self.stage:
            for tensor, view in zip(self.tensors, self.gradient_views, strict=True):
                deepspeed.utils.safe_set_full_grad(tensor, view)


def resolve(given: dict[str, Any], local: Local, precision: str) -> dict[str, Any]:
    """The config that DeepSpeed gets: with what the YAML says, and fp32 parameters throughout."""
    ours = {key: v for key, v in given.items() if key not in ("bf16", "fp16", "optimizer")}
    ours["train_micro_batch_size_per_gpu"] = local.batch_size
    ours["gradient_accumulation_steps"] = 1
    ours["gradient_clipping"] = local.clip  # DeepSpeed's own default is 1
    ours["zero_allow_untested_optimizer"] = True  # SGD is not in ZeRO's list
    if precision != "fp32":
        # no module is "safe" to reduce in half precision: gradients travel as float32
        autocast = {"enabled": True, "dtype": AUTOCAST[precision]}
        ours["torch_autocast"] = autocast | {"lower_precision_safe_modules": []}
    return ours


class EngineLogs:
    """DeepSpeed's wall-clock breakdown and communication log, if its config asks for them.

    They are written into the run folder: deepspeed_wall_clock.rank<n>.txt, and
    deepspeed_comms.rank<n>.jsonl with a line per client, which holds the count, the bytes and the
    milliseconds of each operation.
    """

    def __init__(self, given: dict[str, Any], folder: Path):
        rank = dist.get_rank()
        self.comms = self.breakdown = None
        if given.get("comms_logger", {}).get("enabled"):
            self.comms = open(folder / f"deepspeed_comms.rank{rank}.jsonl", "a", buffering=1)
        if given.get("wall_clock_breakdown"):
            path = folder / f"deepspeed_wall_clock.rank{rank}.txt"
            self.breakdown = open(path, "a", buffering=1)

    def quiet_step(self) -> contextlib.AbstractContextManager:
        """Within this context, what DeepSpeed prints goes to the file of the breakdown."""
        if self.breakdown:
            return contextlib.redirect_stdout(self.breakdown)
        return contextlib.nullcontext()

    def end_client(self) -> None:
        if self.comms:
            logger = deepspeed.comm.comm.comms_logger
            operations = logger.log_all(print_log=False, return_dict=True)["summary"]
            self.comms.write(json.dumps(operations) + "\n")
            logger.reset_data()
