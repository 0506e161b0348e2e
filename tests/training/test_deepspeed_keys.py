"""deepspeed_keys.py against the config reader of the installed DeepSpeed."""

import json
import sys

import pytest
from helpers.runs import REPOSITORY

from training.deepspeed_keys import unknown_keys

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="DeepSpeed is for Linux only"
)


@pytest.mark.parametrize(
    ("config", "unknown"),
    [
        ({"train_micro_batch_size_per_gpu": "auto", "communication_data_type": "fp32"}, []),
        ({"optimizer": {"type": "SGD", "params": {"lr": 0.1, "what": 1}}}, []),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, []),
        ({"gradient_cliping": 1}, ["gradient_cliping (did you mean 'gradient_clipping'?)"]),
        (
            {"fp16": {"enabled": "auto", "initial_scale_pow": 3}},
            ["fp16.initial_scale_pow (did you mean 'initial_scale_power'?)"],
        ),
        ({"torch_autocast": {"dtyp": "x"}}, ["torch_autocast.dtyp (did you mean 'dtype'?)"]),
        ({"qqq": {"stage": 1}}, ["qqq"]),
        ({"amp": {"enabled": False}}, ["amp"]),  # DeepSpeed took it out
    ],
)
def test_unknown_keys(config, unknown):
    assert unknown_keys(config) == unknown


def test_a_value_that_deepspeed_refuses():
    with pytest.raises(ValueError, match="DeepSpeedZeroConfig: stage"):
        unknown_keys({"zero_optimization": {"stage": 7}})


def test_the_file_in_the_repository_is_known():
    assert unknown_keys(json.loads((REPOSITORY / "deepspeed_config.json").read_text())) == []
