"""deepspeed_file.py: what deepspeed_config.json must not say, and what DeepSpeed gets of it."""

import json
import sys
from pathlib import Path

import pytest
from helpers.configs import CONFIGS

from command_line import load_config
from config import Config, ConfigError
from training.deepspeed_file import read_config, read_deepspeed_file

needs_deepspeed = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="DeepSpeed is for Linux only"
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text("")


def load(content: object, *overrides: str) -> Config:
    """The config of a run beside a ds.json with that content."""
    Path("ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return load_config(Path("x.yaml"), ["deepspeed_config=ds.json", *overrides])


def mistake(content: object, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(content, *overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def nested(dotted: str, value: object) -> dict:
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


# --- the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "ds.json:1: not valid JSON: Expecting value"),
        ('{"a": 1\n "b": 2}', "ds.json:2: not valid JSON: Expecting ',' delimiter"),
        ('{\n"a": }', "ds.json:2: not valid JSON: Expecting value"),
        ('{"a": 1} // mine', "ds.json:1: not valid JSON: Extra data"),
        ("[1]", "ds.json: a DeepSpeed config is an object"),
        ("3", "ds.json: a DeepSpeed config is an object"),
        ("[" * 100_000, "ds.json: maximum recursion depth"),
        ('{"fp16": {}, "bf16": {}, "fp16": {}}', "ds.json: fp16 stands twice in one object"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "ds.json: stage stands twice in one "),
        ('{"steps_per_print": 5, "steps_per_print": 5}', "ds.json: steps_per_print stands twice"),
    ],
)
def test_a_broken_file_is_named(content, message):
    assert mistake(content).startswith(message)


def test_a_file_in_another_encoding():
    Path("ds.json").write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match="^ds.json: not UTF-8 text; save it as UTF-8$"):
        load_config(Path("x.yaml"), ["deepspeed_config=ds.json"])
    Path("ds.json").write_bytes("{}".encode("utf-8-sig"))  # as Windows' editors write it
    load_config(Path("x.yaml"), ["deepspeed_config=ds.json"])


@pytest.mark.parametrize("path", ["missing.json", "/nowhere/ds.json", "~/missing.json", "."])
def test_a_file_that_is_named_must_be_there(path):
    for text, words in (("", [f"deepspeed_config={path}"]), (f"deepspeed_config: {path}", [])):
        Path("x.yaml").write_text(text)
        with pytest.raises(ConfigError) as error:
            load_config(Path("x.yaml"), words)
        message = str(error.value)
        assert message.startswith("deepspeed_config: ") and "\n" not in message
        assert message.endswith("; correct the path, or write deepspeed_config= for none")


def test_no_file_is_fine_where_none_is_named():
    config = load_config(Path("x.yaml"), ["deepspeed_config="])
    assert read_deepspeed_file(config) == {}


# --- our settings and its -----------------------------------------------------------------------

OURS = [  # theirs, our override, a value that agrees, others that do not
    ("train_micro_batch_size_per_gpu", "local.batch_size=32", 32, [64, None, True]),
    ("gradient_accumulation_steps", "seed=1", 1, [2, True]),
    ("gradient_clipping", "local.clip=1.5", 1.5, [1.0, None]),
    ("gradient_clipping", "local.clip=0", 0, [1, False]),
    ("optimizer.type", "local.optimizer=SGD", "SGD", ["AdamW", 3]),
    ("optimizer.params.lr", "local.lr=0.25", 0.25, [0.1]),
    ("optimizer.params.momentum", "local.momentum=0.5", 0.5, [0.9]),
    ("optimizer.params.weight_decay", "local.weight_decay=0.5", 0.5, [0]),
    ("optimizer.params.nesterov", "local.nesterov=true", True, [False, 1]),
    ("fp16.enabled", "precision=fp16", True, [False]),
    ("fp16.enabled", "precision=bf16", False, [True, 0]),
    ("bf16.enabled", "precision=bf16", True, [False]),
    ("bf16.enabled", "precision=fp32", False, [True]),
]


@pytest.mark.parametrize(("theirs", "override", "same", "others"), OURS)
def test_it_must_agree_or_say_auto(theirs, override, same, others):
    for value in (same, "auto"):
        load(nested(theirs, value), override)
    for other in others:
        message = mistake(nested(theirs, other), override)
        assert message.startswith(f"ds.json: {theirs} is {json.dumps(other)} but ")
        assert message.endswith('; write "auto" there')
        if theirs != "gradient_accumulation_steps":
            assert override.partition("=")[0] in message


def test_it_may_say_what_we_do_not():
    load({"zero_optimization": {"stage": 2}, "optimizer": "auto", "fp16": {}})
    load({"fp16": {"enabled": True}})  # precision is auto
    load({"zero_optimization": "auto", "steps_per_print": 5, "comms_logger": {"enabled": True}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"bf16": False}, "bf16 is false; it takes an object of keys"),
        ({"fp16": "yes"}, 'fp16 is "yes"; it takes an object of keys'),
        ({"bf16": None}, "bf16 is null; it takes an object of keys"),
        ({"zero_optimization": True}, "zero_optimization is true; it takes an object of keys"),
        ({"zero_optimization": 2}, "zero_optimization is 2; it takes an object of keys"),
        ({"comms_logger": [1]}, "comms_logger is [1]; it takes an object of keys"),
        ({"optimizer": "SGD"}, 'optimizer is "SGD"; it takes an object of keys'),
        ({"optimizer": {"params": 3}}, "optimizer.params is 3; it takes an object of keys"),
        ({"zero_optimization": {"stage": "two"}}, 'zero_optimization.stage is "two"; there are '),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is true; there are "),
        ({"zero_optimization": {"stage": 1.0}}, "zero_optimization.stage is 1.0; there are "),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3; there are 0, 1 and 2"),
        ({"zero_optimization": {"stage": None}}, "zero_optimization.stage is null; there are "),
        ({"zero_optimization": {"stage": "2"}}, 'zero_optimization.stage is the text "2"; write '),
        ({"comms_logger": {"enabled": "no"}}, 'comms_logger.enabled is the text "no"; write '),
        ({"wall_clock_breakdown": "false"}, 'wall_clock_breakdown is the text "false"; write '),
        ({"gradient_clipping": "1e-1"}, 'gradient_clipping is the text "1e-1"; write '),
        *(({"zero_optimization": {"stage": 1, key: value}}, f"zero_optimization.{key}: nothing ")
          for key, value in (("offload_optimizer", {"device": "cpu"}), ("cpu_offload", True),
                             ("offload_param", {"device": "nvme"}), ("offload_optimizer", "cpu"))),
        ({"steps_per_print": "often"}, 'steps_per_print is "often"; it takes a whole number'),
        ({"steps_per_print": 0}, "steps_per_print is 0; it takes a whole number above 0"),
        ({"steps_per_print": True}, "steps_per_print is true; it takes a whole number above 0"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: set local.lr_schedule in the YAML"),
        ({"amp": {"enabled": True}}, "amp: set precision in the YAML"),
        ({"train_batch_size": 64}, "train_batch_size follows from local.batch_size"),
        ({"fp16": {"enabled": "auto", "loss_scale": 128}}, "fp16.loss_scale does nothing here"),
        ({"optimizer": {"type": "SGD", "legacy": 1}}, "optimizer.legacy does nothing here"),
    ],
)  # fmt: skip
def test_what_is_not_what_we_expect_is_one_line_with_file_and_key(content, message):
    assert mistake(content).startswith(f"ds.json: {message}")


def test_the_repositorys_file_fits_every_yaml():
    for config in CONFIGS:
        assert read_deepspeed_file(load_config(config, []))


# --- what DeepSpeed says ------------------------------------------------------------------------


@needs_deepspeed
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimisation": {"stage": 1}}, "DeepSpeed has no key zero_optimisation (did you "),
        ({"comms_logger": {"enabled": "perhaps"}}, "comms_logger.enabled: Input should be a valid"),
        ({"gradient_cliping": "auto"}, "DeepSpeed has no key gradient_cliping (did you mean "),
    ],
)
def test_what_deepspeed_refuses_is_one_line_with_file_and_key(content, message):
    config = load(content)
    with pytest.raises(ConfigError) as error:
        read_config(config)
    assert str(error.value).startswith(f"ds.json: {message}") and "\n" not in str(error.value)


@needs_deepspeed
def test_auto_is_left_out():
    content = {"train_batch_size": "auto", "wall_clock_breakdown": False, "fp16": "auto"}
    content |= {"zero_optimization": {"stage": "auto", "overlap_comm": True}}
    left = {"wall_clock_breakdown": False, "zero_optimization": {"overlap_comm": True}}
    assert read_config(load(content)) == left
