"""DeepSpeed as the engine that trains clients (Rasley et al. 2020; ZeRO: arXiv 1910.02054).

One engine serves all clients of a rank. Parameters stay float32 in every precision (torch.autocast
inside DeepSpeed), so the flat vectors of a FlatModel stay the ones that are trained: without ZeRO
they are the network's own; at stage 1 and 2 `parameters` becomes DeepSpeed's flat buffer, and
`gradients` is filled only where a correction looks at it.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from cnn_model import FlatModel
from config import Config, Local
from distributed import Team
from training.deepspeed_file import read_config
from training.engines import FIRST_SCALE_POWER, Amend, clip_gradient, make_sgd

AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


class Groups:
    """Who trains together, in the words of DeepSpeed's `mpu`: teams of k ranks share a client."""

    def __init__(self, ranks_per_client: int):
        self.size = ranks_per_client
        self.data, _ = dist.new_subgroups(ranks_per_client)
        self.model, _ = dist.new_subgroups(1)  # no tensor parallelism: everybody alone

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


class DeepSpeedEngine:
    """forward, backward, step for each batch; begin() before a client's first."""

    def __init__(
        self,
        model: FlatModel,
        config: Config,
        precision: str,  # fp32, bf16, fp16
        team: Team,
        folder: Path,  # for DeepSpeed's logs
    ):
        local, given = config.local, read_config(config)
        self.model, self.team, self.clip = model, team, local.clip
        self.stage = given.get("zero_optimization", {}).get("stage", 0)
        power = given.get("fp16", {}).get("initial_scale_power", FIRST_SCALE_POWER)
        self.first_scale = 2.0**power
        self.sgd = make_sgd(list(model.network.parameters()), local)
        if self.stage:
            model.network.zero_grad(set_to_none=True)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model.network,
            optimizer=self.sgd,
            config=resolve(given, local, precision),
            mpu=Groups(team.size),
        )
        self.engine.enable_backward_allreduce = self.stage > 0 or team.size > 1
        if self.stage:  # DeepSpeed moved the parameters, in their order, to a vector of its own
            model.parameters = self.optimizer.bit16_groups_flat[0][: len(model.parameters)]
        else:  # the norm over the vector, not over its tensors: the bits of the other engine
            self.engine.clip_fp32_gradients = lambda: clip_gradient(model, local.clip)
        self.gradient_views = model.views(model.gradients)
        owner, name = self.engine, "torch_autocast_z0_gradscaler"
        if self.stage:
            owner, name = self.optimizer, "torch_autocast_gradscaler"
        self.scaler = getattr(owner, name) if precision == "fp16" else None
        self.logs = EngineLogs(given, folder)

    def begin(self, lr: float, amend: Amend | None) -> None:
        """Train from what model.parameters holds, without memory of the client before."""
        self.amend = amend
        for group in self.sgd.param_groups:
            group["lr"] = lr
            for parameter in group["params"] if group["momentum"] else ():
                # Fused SGD would leave it uninitialised where the first step overflows (fp16).
                self.sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        if self.stage:
            self.optimizer.refresh_fp32_params()
        if self.scaler:
            scale = {"scale": self.first_scale, "growth_factor": 2.0, "backoff_factor": 0.5}
            self.scaler.load_state_dict(scale | {"growth_interval": 2000, "_growth_tracker": 0})

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [B, num_classes]: DeepSpeed's autocast ends with the network."""
        self.model.gradients.zero_()
        return self.engine(images).float()

    def backward(self, loss: Tensor, share: float) -> None:
        """The gradient of a mean loss over `share` of the batch; DeepSpeed averages the team's."""
        self.engine.backward(loss * (share * self.team.size))

    def step(self) -> int:
        """Amend, clip and apply the gradient; return 1 if fp16 overflowed and skipped the step."""
        scale = self.scaler.get_scale() if self.scaler else 1.0
        if self.amend:
            self._amend(scale)
        if self.stage and self.scaler:  # ZeRO compares the clip with the scaled norm
            self.optimizer.clip_grad = self.clip * scale
        with self.logs.quiet_step():
            self.engine.step()
        if not self.stage:  # DeepSpeed took .grad away
            parameters = self.model.network.parameters()
            for parameter, view in zip(parameters, self.gradient_views, strict=True):
                parameter.grad = view
        if not self.scaler:
            return 0
        if self.stage and not self.engine.was_step_applied():  # ZeRO skips, and keeps the scale
            self.scaler.update(scale * self.scaler.get_backoff_factor())
        return int(self.scaler.get_scale() < scale)

    def end(self) -> None:
        """A client is done."""
        self.logs.end_client()

    def _amend(self, scale: float) -> None:
        gradients, parameters = self.model.gradients, list(self.model.network.parameters())
        if self.stage:
            for parameter, view in zip(parameters, self.gradient_views, strict=True):
                view.copy_(deepspeed.utils.safe_get_full_grad(parameter))
        gradients.div_(scale)  # a power of two: exact both ways
        self.amend(self.model.parameters, gradients)
        gradients.mul_(scale)
        if self.stage:
            for parameter, view in zip(parameters, self.gradient_views, strict=True):
                deepspeed.utils.safe_set_full_grad(parameter, view)


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
    """DeepSpeed's wall-clock breakdown and comms log, where its config asks for them.

    In the run folder: deepspeed_wall_clock.rank<n>.txt, and deepspeed_comms.rank<n>.jsonl with a
    line a client: each operation's count, bytes and milliseconds.
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
        """What DeepSpeed prints within goes to the file."""
        if self.breakdown:
            return contextlib.redirect_stdout(self.breakdown)
        return contextlib.nullcontext()

    def end_client(self) -> None:
        if self.comms:
            logger = deepspeed.comm.comm.comms_logger
            operations = logger.log_all(print_log=False, return_dict=True)["summary"]
            self.comms.write(json.dumps(operations) + "\n")
            logger.reset_data()
