"""deepspeed_keys.py against the config reader of the installed DeepSpeed."""

import json
import sys

import pytest
from helpers.runs import REPOSITORY

from training.deepspeed_keys import check_keys

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="DeepSpeed is for Linux only"
)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"train_micro_batch_size_per_gpu": "auto", "communication_data_type": "fp32"},
        {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "what": 1}}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        {"tensorboard": {"enabled": True}, "flops_profiler": {"enabled": False}},
        {"wall_clock_breakdown": "auto", "dump_state": True, "gradient_predivide_factor": 2.0},
    ],
)
def test_keys_that_deepspeed_knows(config):
    check_keys(config)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"gradient_cliping": 1}, "gradient_cliping (did you mean 'gradient_clipping'?)"),
        (
            {"fp16": {"enabled": "auto", "initial_scale_pow": 3}},
            "fp16.initial_scale_pow (did you mean 'initial_scale_power'?)",
        ),
        ({"torch_autocast": {"dtyp": "x"}}, "torch_autocast.dtyp (did you mean 'dtype'?)"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"devic": "cpu"}}},
            "zero_optimization.offload_optimizer.devic (did you mean 'device'?)",
        ),
        ({"steps_per_print": 3, "qqq": {"stage": 1}}, "qqq"),
        ({"amp": {"enabled": False}}, "amp"),  # DeepSpeed took it out
    ],
)
def test_keys_that_deepspeed_does_not_know(config, key):
    with pytest.raises(ValueError) as error:
        check_keys(config)
    assert str(error.value).partition(";")[0] == f"DeepSpeed has no key {key}"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage: Input should be "),
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage: Input should be "),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpuu"}}},
            "zero_optimization.offload_optimizer.device: Input should be 'none', 'cpu' or 'nvme'",
        ),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "zero_optimization.offload_optimi"),
        ({"steps_per_print": 3, "bf16": False}, "bf16: DeepSpeed cannot read False: "),
        ({"comms_logger": True}, "comms_logger: DeepSpeed cannot read True: "),
        ({"flops_profiler": False}, "flops_profiler: DeepSpeed cannot read False: "),
        ({"activation_checkpointing": 5}, "activation_checkpointing: DeepSpeed cannot read 5: "),
        ({"wall_clock_breakdown": "never"}, "wall_clock_breakdown: DeepSpeed cannot read 'never'"),
        ({"prescale_gradients": "never"}, "prescale_gradients is 'never'; it takes true or false"),
        ({"memory_breakdown": None}, "memory_breakdown is None; it takes true or false"),
        ({"communication_data_type": "fp77"}, "communication_data_type: DeepSpeed cannot read "),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "bfloat16 and fp16 modes cannot"),
    ],
)
def test_values_that_deepspeed_refuses_or_stumbles_over(config, message):
    with pytest.raises(ValueError) as error:
        check_keys(config)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_the_file_in_the_repository_is_known():
    check_keys(json.loads((REPOSITORY / "deepspeed_config.json").read_text()))
