"""config.py: precedence, and that every mistake is one line with its place and a hint."""

import dataclasses
import itertools
import math
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import yaml
from PIL import Image

from command_line import load_config, read_command_line
from compressors.quantisers import parse_values
from config import Config, ConfigError, from_here
from typed_yaml import Settings

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder, as somebody who stands elsewhere does."""
    monkeypatch.chdir(tmp_path)


def load(text: str = "", *overrides: str) -> Config:
    Path("x.yaml").write_text(text)
    return load_config(Path("x.yaml"), list(overrides))


def mistake(text: str = "", *overrides: str) -> str:
    """The message of the ConfigError that this ends in: one line."""
    with pytest.raises(ConfigError) as error:
        load(text, *overrides)
    message = str(error.value)
    assert message and "\n" not in message
    return message


# --- precedence and types -------------------------------------------------------------------------


def test_defaults_then_yaml_then_command_line():
    assert load() == Config()
    text = "rounds: 20\nlocal:\n  lr: 0.3\n  lr_schedule:\n    name: cosine\n"
    config = load(text, "local.lr=0.2", "server.optimizer=FedYogi", "clients.total=50")
    assert config.local.lr == 0.2  # command line over YAML
    assert config.rounds == 20 and config.local.lr_schedule.name == "cosine"  # YAML over defaults
    assert config.clients.total == 50 and config.server.optimizer == "FedYogi"
    assert config.local.momentum == 0.9 and config.local.lr_schedule.gamma == 0.1  # defaults
    assert load("rounds: 20", "rounds=1", "rounds=2").rounds == 2  # the last one counts


def test_values_arrive_in_their_types():
    config = load(
        "seed: 0\n"
        "local: {lr: 1e-3, nesterov: true, steps: 5, weight_decay: 1}\n"
        "data: {padding: 0, flip: false, partition: {name: dirichlet, args: {alpha: 0.1}}}\n"
        "trackers: []\n",
        "local.lr_schedule.milestones=[2,3]",
        "server.options.betas=[0.8,0.9]",
        "data.fallback=",
    )
    assert config.seed == 0 and config.local.lr == 0.001 and config.local.nesterov is True
    assert config.local.steps == 5 and type(config.local.weight_decay) is float
    assert config.data.padding == 0 and config.data.flip is False and config.data.fallback == ""
    assert config.data.partition.args == {"alpha": 0.1} and type(config.data.partition.args) is dict
    assert config.local.lr_schedule.milestones == [2, 3]
    assert config.server.options == {"betas": [0.8, 0.9]} and config.trackers == []


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("012", "seed", 12),  # YAML 1.1: 10, octal
        ("008", "seed", 8),
        ("1_000", "rounds", 1000),
        ("3e5", "name", "3e5"),  # 300000.0
        ("012", "name", "012"),
        ("2026-13-45", "name", "2026-13-45"),  # a date that is none: a traceback
        ("2026-11-27", "name", "2026-11-27"),
        ("on", "name", "on"),  # True
        ("1_000", "name", "1_000"),
        ("0x1f", "name", "0x1f"),
        ("no", "data.fallback", "no"),
        ("1:30", "data.fallback", "1:30"),  # 90, sexagesimal
        ("a#b", "data.fallback", "a#b"),
        ("on", "data.flip", True),
        ("No", "local.nesterov", False),
        ("1", "local.lr", 1.0),
        ("1e-3", "local.lr", 0.001),
        ("5", "local.steps", 5),
        ("null", "local.steps", None),
    ],
)
def test_a_value_is_what_its_field_says_and_never_what_it_looks_like(written, key, value):
    section, _, name = key.rpartition(".")
    line = f"{section}: {{{name}: {written}}}" if section else f"{name}: {written}"
    for config in (load(line), load("", f"{key}={written}")):
        found = attrgetter(key)(config)
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["a # b", "[a]", "{a", "'a'", "*a", "&a", "!a", "a: b", "- a"])
def test_an_override_of_text_is_that_text(text):
    assert load("", f"data.fallback={text}").data.fallback == text


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *[("3", 3), ("-3", -3), ("0.5", 0.5), (".5", 0.5), ("1e-7", 1e-7), ("2.", 2.0)],
        *[("true", True), ("False", False), ("null", None), ("~", None), ("adam", "adam")],
        *[
            ("'012'", "012"),
            ('"on"', "on"),
            ("[1, a]", [1, "a"]),
            ("{a: {b: 0.1}}", {"a": {"b": 0.1}}),
        ],
    ],
)
def test_an_option_of_a_dict_is_guessed(written, value):
    for config in (
        load(f"server: {{options: {{x: {written}}}}}"),
        load("", f"server.options.x={written}"),
    ):
        found = config.server.options
        assert found == {"x": value} and type(found["x"]) is type(value)


@pytest.mark.parametrize(
    "written",
    [*("012", "08", "1_000", "0x1f", "1:30", "2026-11-27", "3rd", "1e999"), *("on", "no", "None")],
)
def test_an_option_that_could_be_two_things_is_refused(written):
    for text, words, place in (
        (f"server: {{options: {{x: {written}}}}}", [], "x.yaml:1: server.options"),
        ("", [f"server.options.x={written}"], "command line: server.options"),
    ):
        assert mistake(text, *words).startswith(f"{place}: '{written}' is unclear; write ")


def test_a_dict_is_replaced_and_its_options_are_changed_one_by_one():
    text = "data: {partition: {name: dirichlet, args: {alpha: 0.1, seed: 3}}}"
    assert load(text, "data.partition.args={}").data.partition.args == {}
    assert load(text, "data.partition.args={alpha: 1}").data.partition.args == {"alpha": 1}
    changed = load(text, "data.partition.args.alpha=1").data.partition
    assert changed.args == {"alpha": 1, "seed": 3} and changed.name == "dirichlet"


def test_null_is_for_optional_keys():
    text = "local: {steps: null}\ndata: {padding: null, flip: null}\nserver: {lr: null, v0: null}"
    config = load(text, "server.tau=null")
    assert config.local.steps is config.data.padding is config.data.flip is None
    assert config.server.lr is config.server.v0 is config.server.tau is None
    assert mistake("seed: 1\nrounds: null").startswith("x.yaml:2: rounds: ")
    assert mistake("", "local.lr=null").startswith("command line: local.lr: ")


def test_config_is_frozen():
    config = load()
    for section, key in ((config, "seed"), (config.local, "lr"), (config.data.partition, "name")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, key, 1)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["server.optimizer=Adam", "server.options.betas=[0.8,0.9]", "server.lr=1e-05"],
        ["local.lr_schedule={name: step, gamma: 0.5, milestones: [1, 2]}", "local.steps=3"],
        ["data.partition.args={alpha: 1e-7, note: '1e5', when: '2020-01-01', word: 'on'}"],
        ["data.partition.args={a: '08', b: '1e5', c: 'None', d: 'y', e: '.inf', f: '1:30'}"],
        ["server.options={a: null, b: -3, c: 1.5e-7, d: false, e: [x, 2, {f: g}], h: '', i: a b}"],
        ["name=1e5", "seed=123456789012345678901"],
        ["name=007", "data.root=~/a b/ü"],
    ],
)
def test_to_yaml_round_trips(overrides):
    config = load("", *overrides)
    assert load(config.to_yaml()) == config


def test_every_yaml_of_the_repository_loads():
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        config = load_config(path, [])
        assert path.name == "default.yaml" or not config.data.fallback  # no other config falls back


def test_the_run_folder_is_named_after_the_run_and_its_seed():
    config = load("", "name=a.b-c", "seed=7", "output_dir=out")
    assert config.run_folder == Path("out/a.b-c-s7")


# --- names ----------------------------------------------------------------------------------------


def name(text: str, *overrides: str) -> str:
    return load(f"name: base\n{text}", *overrides).name


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "base"),
        (["server.optimizer=FedYogi"], "base+server.optimizer=FedYogi"),
        (["rounds=3", "local.lr=1e-2"], "base+local.lr=0.01+rounds=3"),
        (["local.lr=0.010", "rounds=03"], "base+local.lr=0.01+rounds=3"),  # another order, spelling
        (["data.partition.args.alpha=.30"], "base+data.partition.args.alpha=0.3"),
        (["server.options={b: 2, a: 1}"], "base+server.options.a=1+server.options.b=2"),
        (["data.flip=no", "local.steps=5"], "base+data.flip=false+local.steps=5"),
        (["pruning.warmup=[0.25, 0.0625]"], "base+pruning.warmup=0.25,0.0625"),
        (["server.lr=1", "server.lr=null"], "base"),  # the last one counts
        (["rounds=10", "data.fallback=", "pruning.warmup=[]"], "base"),  # as it is without them
        (["seed=7"], "base"),  # in the folder's -s7
        (["output_dir=x", "trackers=[]", "checkpoint.every=2", "checkpoint.resume=never"], "base"),
        (["clients.state_memory_gib=1", "distributed.timeout_seconds=9"], "base"),
        (["name=mine", "rounds=3"], "mine"),
        (["rounds=3", "name=base"], "base"),
    ],
)  # fmt: skip
def test_a_name_takes_what_the_command_line_changed(overrides, expected):
    assert name("", *overrides) == expected


def test_what_the_yaml_says_stands_in_no_name():
    text = "server: {lr: 0.5}\ndata: {partition: {name: dirichlet, args: {alpha: 0.3}}}"
    assert name(text) == name(text, "server.lr=0.50", "data.partition.args.alpha=0.3") == "base"
    assert name(text, "server.lr=null") == "base+server.lr=null"
    assert name(text, "data.partition.args={}") == "base+data.partition.args.alpha="
    assert name("downlink: {pruning: {density: 0.5}}", "downlink.pruning.density=0.01").endswith(
        "+downlink.pruning.density=0.01"
    )


@pytest.mark.parametrize(
    ("override", "readable"),
    [
        ("data.root=../shared/data", "base+data.root=data-"),
        ("data.root=/mnt/all pictures/cifar10.zip", "base+data.root=cifar10.zip-"),
        ("uplink.values=bounded(0.01)", "base+uplink.values=bounded0.01-"),
        ("data.name=uoft-cs/cifar100", "base+data.name=cifar100-"),
        ("server.options={betas: [0.8, 0.9]}", "base+server.options.betas=0.8,0.9-"),
        ("server.options.a='1'", "base+server.options.a=1-"),  # text, where 1 is a number
        ("server.options={a/b: 1}", "base+server.options.ab=1-"),
    ],
)
def test_a_name_that_leaves_something_out_ends_in_a_hash(override, readable):
    found = name("", override)
    assert re.fullmatch(re.escape(readable) + "[0-9a-f]{10}", found)
    assert found == name("", override)


def test_what_a_name_leaves_out_still_makes_another():
    for key, values in (
        ("data.root", ["../data", "a/data", "data/", "/data", "da ta"]),
        ("data.name", ["a/b", "b", "c/b", "(b)", "b+rounds=3"]),
        ("server.options.x", ["1", "'1'", "[1]", "{1: 1}", "null", "'null'", "''"]),
    ):
        names = [name("data: {name: x}", f"{key}={value}") for value in values]
        assert len(set(names)) == len(names), names


def test_a_long_name_is_shortened_and_never_collides():
    words = ["clients.total=50", "clients.per_round=5", "model.name=lenet", "local.batch_size=16"]
    words += ["network.latency_ms=7", "pruning.density=0.001", "uplink.values=fp16"]
    names = [name("", *words, f"rounds={rounds}") for rounds in range(1, 200)]
    assert len(set(names)) == len(names)
    for found in names:
        assert len(found) == 100
        assert found.startswith("base+clients.per_round=5+clients.total=50+local.batch_size=16+")
    assert name("", *reversed(words), "rounds=7") == names[6]


def test_a_resolved_config_has_its_name_already():
    """The config.yaml of a run folder, given to --config, is that run again."""
    config = load("name: base", "server.optimizer=FedYogi", "uplink.values=bounded(0.5)")
    assert load(config.to_yaml()) == config
    assert load(config.to_yaml(), "rounds=3").name == f"{config.name}+rounds=3"


def test_another_word_is_another_run_and_the_same_words_are_the_same(tmp_path):
    """As in README: one changed word after the other, each of them with a folder of its own."""
    variants = [[], ["server.optimizer=FedYogi"], ["local.algorithm=SCAFFOLD"], ["seed=2"]]
    variants += [["pruning.density=0.001", "uplink.values=fp16"], ["data.root=elsewhere"]]
    default = str(ROOT / "configs/default.yaml")
    folders = [read_command_line(default, words)[0].run_folder for words in variants]
    assert len(set(folders)) == len(folders)
    assert folders == [read_command_line(default, words)[0].run_folder for words in variants]
    assert folders[0].name == "default-s1"
    assert folders[1].name == "default+server.optimizer=FedYogi-s1"
    assert folders[3].name == "default-s2"


# --- paths ----------------------------------------------------------------------------------------

PATHS = ("data.root", "output_dir", "deepspeed_config")


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize(
    ("text", "in_project"),
    [
        ("configs", "configs"),
        ("./configs/../configs", "configs"),
        (f"{ROOT}/configs", "configs"),
        ("../elsewhere", "../elsewhere"),
        ("/nowhere/at/all", "/nowhere/at/all"),
    ],
)
def test_a_path_starts_from_the_project_in_yaml_and_from_here_in_words(key, text, in_project):
    """A Config has it as somebody in the project folder would write it."""
    section, _, name = key.rpartition(".")
    Path("x.yaml").write_text(f"{section}: {{{name}: {text}}}" if section else f"{name}: {text}")
    settings = Settings(Path("x.yaml"))
    assert attrgetter(key)(settings.config()) == in_project
    settings.override(f"{key}={text}")
    found = attrgetter(key)(settings.config())
    assert (ROOT / found).resolve() == Path(text).resolve()
    assert from_here(found).resolve() == Path(text).resolve()


def test_the_home_folder_is_a_home_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("ds.json").write_text("{}")
    Path("home.yaml").write_text("seed: 8")
    text = "data: {root: ~/pictures}\noutput_dir: ~/runs\ndeepspeed_config: ~/ds.json"
    words = ["data.root=~/pictures", "output_dir=~/runs", "deepspeed_config=~/ds.json"]
    for config in (load(text), load("", *words)):
        assert config.data.root == str(tmp_path / "pictures")
        assert config.run_folder.parent == Path("runs")  # as it is written where we stand
        assert config.deepspeed_config == str(tmp_path / "ds.json")
    config, _ = read_command_line("configs/default.yaml", ["--config", "~/home.yaml"])
    assert config.seed == 8
    assert "the home of nobody" in mistake("", "output_dir=~nobody-known/x")
    assert "the home of nobody" in mistake("data: {root: ~nobody-known/x}")


def test_the_run_folder_is_the_same_from_wherever_a_run_is_started(monkeypatch):
    assert load().run_folder == ROOT / "outputFolder/run-s1"
    monkeypatch.chdir(ROOT)
    assert Config().run_folder == Path("outputFolder/run-s1")  # short, where one stands above it
    assert Config(output_dir="../x").run_folder == ROOT.parent / "x/run-s1"


def test_an_output_folder_must_have_a_name():
    assert mistake("", "output_dir=") == "command line: output_dir: names no folder"


def test_main_from_another_folder_finds_its_files_and_the_users(tmp_path):
    """The default config is the project's; pictures and output are where the user stands."""
    for part, label, index in itertools.product(("train", "test"), "ab", range(4)):
        path = tmp_path / "pictures" / part / label / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (50 * index, 0, 0)).save(path)
    words = ["data.name=imagefolder", "data.root=pictures", "data.fallback=", "output_dir=mine"]
    words += ["clients.total=2", "clients.per_round=2", "model.name=lenet", "name=here"]
    command = [sys.executable, str(ROOT / "main.py"), *words, "--dry_run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout.partition("\n\n")[0])
    assert config["rounds"] == 8 and config["deepspeed_config"] == "deepspeed_config.json"
    assert (ROOT / config["output_dir"]).resolve() == (tmp_path / "mine").resolve()


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        # by spelling, by initials, by the list of what there is
        ("seed: 1\nserver:\n  momentun: 0.1", [], "x.yaml:3: server.momentun: no such key; "
         "did you mean 'momentum'?"),
        ("# hello\n\nserver:\n  leraning_rate: 1", [], "x.yaml:4: server.leraning_rate: "
         "no such key; did you mean 'lr'?"),
        ("", ["local.learning_rate=1"], "command line: local.learning_rate: no such key; "
         "did you mean 'lr'?"),
        ("rouns: 3", [], "x.yaml:1: rouns: no such key; did you mean 'rounds'?"),
        ("clients: {q: 1}", [], "x.yaml:1: clients.q: no such key; it takes total, per_round"),
        ("", ["locla.lr=1"], "command line: locla: no such key; did you mean 'local'?"),
        ("local:\n  lr_schedule:\n    gama: 1", [], "x.yaml:3: local.lr_schedule.gama: "
         "no such key; did you mean 'gamma'?"),
        ("pruning.density: 0.1", [], "x.yaml:1: pruning.density: no such key; "
         "did you mean 'pruning'?"),
        ("1: 2", [], "x.yaml:1: 1: no such key; it takes name, "),
        ("", ["local.=5"], "command line: local.: no such key; it takes "),
    ],
)  # fmt: skip
def test_an_unknown_key_has_its_place_and_the_nearest_name(text, overrides, message):
    assert mistake(text, *overrides).startswith(message)


@pytest.mark.parametrize(
    ("text", "overrides", "start"),
    [
        ("rounds: 1.5", [], "x.yaml:1: rounds: "),
        ("rounds: true", [], "x.yaml:1: rounds: "),
        (
            "seed: 1\nlocal:\n  lr: fast",
            [],
            "x.yaml:3: local.lr: takes a number, such as 0.1, not 'fast'",
        ),
        (
            "data:\n  flip: maybe",
            [],
            "x.yaml:2: data.flip: takes true or false, or null, not 'maybe'",
        ),
        ("data:\n  name: [a]", [], "x.yaml:2: data.name: "),
        ("", ["rounds="], "command line: rounds: "),
        ("rounds: 3", ["rounds={}"], "command line: rounds: "),
        ("", ["local.lr.x=1"], "command line: local.lr.x: no such key; local.lr takes a value"),
        ("local: 5", [], "x.yaml:1: local: takes keys below it (algorithm, mu, "),
        ("seed: 1\nlocal:", [], "x.yaml:2: local: takes keys below it (algorithm, mu, "),
        (
            "",
            ["data.partition=5"],
            "command line: data.partition: takes keys below it (name, args), not '5'",
        ),
        ("data:\n  partition:\n    args: null", [], "x.yaml:3: data.partition.args: "),
        ("name: ${nope}", [], "x.yaml:1: name: "),
        ("seed: 1:30", [], "x.yaml:1: seed: takes a whole number, such as 3, not '1:30'"),
        ("", ["seed=0x1f"], "command line: seed: takes a whole number, such as 3, not '0x1f'"),
        ("", ["local.lr=1:30"], "command line: local.lr: takes a number, such as 0.1, not '1:30'"),
        (
            "",
            ["data.crop=2026-11-27"],
            "command line: data.crop: takes a whole number, such as 3, ",
        ),
        ("", ["server.lr="], "command line: server.lr: nothing stands after the ="),
    ],
)
def test_a_wrong_type_has_its_place(text, overrides, start):
    assert mistake(text, *overrides).startswith(start)


@pytest.mark.parametrize(
    ("text", "overrides", "start"),
    [
        (
            "local:\n  lr_schedule:\n    name: step\n    milestones: [a]",
            [],
            "x.yaml:4: local.lr_schedule.milestones: takes a whole number, such as 3, not 'a'",
        ),
        ("seed: 1\ntrackers: [null]", [], "x.yaml:2: trackers"),
        ("", ["trackers=[null]"], "command line: trackers"),
    ],
)
def test_a_wrong_item_of_a_list_has_the_place_of_its_key(text, overrides, start):
    assert mistake(text, *overrides).startswith(start)


@pytest.mark.parametrize(
    ("text", "overrides", "start"),
    [
        ("seed: 1\nnull: 2", [], "x.yaml"),
        ("data:\n  partition:\n    args: [1]", [], "x.yaml:3: data.partition.args: "),
        ("server:\n  options: 5", [], "x.yaml:2: server.options: "),
        ("local:\n  lr_schedule:\n    milestones: {a: 1}", [], "x.yaml:3: local.lr_schedule."),
        ("", ["local.lr_schedule.milestones=5"], "command line: local.lr_schedule.milestones: "),
        ("", ["server.options=[1]"], "command line: server.options: "),
        ("", ["name=${nope}"], "command line: name: "),
    ],
)
def test_odd_mistakes_end_in_one_line_as_well(text, overrides, start):
    assert mistake(text, *overrides).startswith(start)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        *((f"data.flip={value}", f"takes true or false, or null, not '{value}'")
          for value in ("2", "1", "-1", "None", "maybe")),
        *((f"local.nesterov={value}", f"takes true or false, not '{value}'")
          for value in ("1", "0.0", "null", "None")),
        *((f"rounds={value}", f"takes a whole number, such as 3, not '{value}'")
          for value in ("true", "1.0", "1e3", "None", "null", "nan", "ten")),
        *((f"local.steps={value}", f"takes a whole number, such as 3, or null, not '{value}'")
          for value in ("None", "5.0", "true")),
        *((f"local.lr={value}", f"takes a number, such as 0.1, not '{value}'")
          for value in ("None", "true", "1%", "1,5", "10^-3")),
        *((f"{key}={value}", f"takes text, not '{value}'")
          for key in ("name", "data.fallback", "server.scheduler") for value in ("None", "null")),
        *((f"trackers=[{value}]", f"takes text, not '{value}'") for value in ("None", "null")),
        *((f"local.lr_schedule.milestones=[{value}]", f"{value} is out of range; at least 1")
          for value in (-3, 0)),
        ("local.lr_schedule.milestones=[2.5]", "takes a whole number, such as 3, not '2.5'"),
        *((f"{key}=[0.5, {value}]", f"{shown} is out of range; above 0.0, at most 1.0")
          for key in ("pruning.warmup", "pruning.client_densities", "downlink.pruning.warmup")
          for value, shown in (("nan", "nan"), ("-1", "-1.0"), ("0", "0.0"), ("1.5", "1.5"))),
    ],
)  # fmt: skip
def test_a_value_that_means_something_else_is_refused(override, reason):
    key, _, value = override.partition("=")
    assert mistake("", override) == f"command line: {key}: {reason}"
    *sections, name = key.split(".")
    lines = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
    lines.append(f"{'  ' * len(sections)}{name}: {value}")
    assert mistake("\n".join(lines)) == f"x.yaml:{len(lines)}: {key}: {reason}"


NUMBERS = [
    *[f"{key}=0" for key in ("rounds", "clients.total", "clients.per_round", "local.epochs")],
    *[f"{key}=0" for key in ("local.steps", "local.batch_size", "evaluation.every")],
    *[f"{key}=0" for key in ("evaluation.last", "evaluation.batch_size", "checkpoint.every")],
    *[f"{key}=0" for key in ("local.lr", "server.lr", "server.tau", "model.width")],
    *[f"{key}=0" for key in ("pruning.density", "network.uplink_mbps", "network.downlink_mbps")],
    "local.lr_schedule.gamma=0",
    *[f"{key}=-1" for key in ("seed", "data.padding", "local.lr", "local.momentum", "server.v0")],
    *[f"{key}=-0.1" for key in ("local.weight_decay", "local.clip", "pruning.threshold")],
    *[f"{key}=-0.1" for key in ("network.latency_ms", "network.ms_per_example", "server.momentum")],
    *[f"{key}=1.1" for key in ("local.momentum", "server.momentum", "server.beta1")],
    *[f"{key}=1.1" for key in ("server.beta2", "pruning.density", "local.lr_schedule.gamma")],
    *[f"{key}=nan" for key in ("local.lr", "server.lr", "pruning.density", "local.clip")],
    *[f"{key}=inf" for key in ("local.lr", "server.tau", "model.width", "local.clip")],
    *["local.lr=-inf", "local.lr=1e999", "server.v0=Infinity"],
    *[f"{key}=0" for key in ("pruning.chunk", "pruning.mask.density", "downlink.pruning.density")],
    *[f"{key}=-1" for key in ("uplink.dense_below", "downlink.dense_below", "uplink.momentum")],
    *[f"{key}={2**32}" for key in ("uplink.dense_below", "downlink.dense_below")],
    *[f"{key}=1.1" for key in ("uplink.decay", "uplink.momentum", "pruning.mask.share")],
]


@pytest.mark.parametrize("override", NUMBERS)
def test_numbers_out_of_range(override):
    key, _, value = override.partition("=")
    message = mistake("", override)
    assert message.startswith(f"command line: {key}: ") and " is out of range; " in message


def test_ranges_include_their_ends_and_say_what_they_are():
    load("", "pruning.density=1", "local.momentum=0", "local.clip=0", "seed=0", "server.v0=0")
    load("", "clients.total=1", "clients.per_round=1", "network.latency_ms=0", "local.momentum=1")
    assert mistake("pruning:\n  density: 2").endswith(
        ": pruning.density: 2.0 is out of range; above 0.0, at most 1.0"
    )
    assert mistake("rounds: 0") == "x.yaml:1: rounds: 0 is out of range; at least 1"


def test_words():
    choices = ["auto", "cpu", "cuda"]
    assert [load("", f"device={word}").device for word in choices] == choices
    message = "x.yaml:2: model.name: 'resnet19' is not one of resnet18, resnet50, cnn, lenet"
    assert mistake("model:\n  name: resnet19") == message
    for key in ("device", "precision", "model.name", "model.stem", "local.algorithm"):
        assert mistake("", f"{key}=X").startswith(f"command line: {key}: 'X' is not one of ")
    for key in ("local.optimizer", "local.lr_schedule.name", "pruning.method", "pruning.scope"):
        assert mistake("", f"{key}=X").startswith(f"command line: {key}: 'X' is not one of ")
    for key in ("downlink.mode", "server.weighting", "checkpoint.resume"):
        assert mistake("", f"{key}=X").startswith(f"command line: {key}: 'X' is not one of ")


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("clients:\n  total: 30\n  per_round: 31", [], "x.yaml:3: clients.per_round: 31 is more "
         "than clients.total=30"),
        ("", ["clients.total=5"], "command line: clients.per_round: 10 is more than "),
        ("local:\n  nesterov: true\n  momentum: 0", [], "x.yaml:2: local.nesterov: needs "),
        ("model:\n  norm: layer", [], "x.yaml:2: model.norm: 'layer' is neither batch nor "),
        ("model:\n  norm: group(0)", [], "x.yaml:2: model.norm: 'group(0)' is neither"),
        ("model:\n  norm: group(2)x", [], "x.yaml:2: model.norm: 'group(2)x' is neither"),
        ("name: a/b", [], "x.yaml:1: name: 'a/b' must be usable as a folder"),
        ("name: -x", [], "x.yaml:1: name: '-x' must be usable as a folder"),
        ("name: a b", [], "x.yaml:1: name: 'a b' must be usable as a folder"),
        (f"name: {'x' * 253}", ["seed=12"], "x.yaml:1: name: with the seed it is longer than "),
        ("", [f"name={'x' * 253}"], "command line: name: with the seed it is longer than "),
        ("name: ..", [], "x.yaml:1: name: '..' must be usable as a folder"),
        ("name: ''", [], "x.yaml:1: name: '' must be usable as a folder"),
        ("", ["name="], "command line: name: '' must be usable as a folder"),
        ("local:\n  lr_schedule:\n    name: step", [], "x.yaml:2: local.lr_schedule.milestones: "
         "step needs"),
        ("pruning: {warmup: [0.5, 0]}", [], "x.yaml:1: pruning.warmup: 0.0 is out of range"),
        ("pruning: {client_densities: [2]}", [], "x.yaml:1: pruning.client_densities: 2.0 is"),
        ("downlink: {pruning: {method: topk}}", [], "x.yaml:1: downlink.pruning.method: a part of "
         "the model can be sent only in mode: change"),
        ("uplink: {values: powersgd(2)}", [], "x.yaml:1: uplink.values: powersgd(2) needs whole "),
        (
            "pruning: {method: none, mask: {method: snip}}",
            ["uplink.values=powersgd(2)"],
            "command line: uplink.values: powersgd(2) needs whole tensors: pruning.mask.method",
        ),
        ("uplink: {momentum: 0.9}", [], "x.yaml:1: uplink.momentum: needs local.steps: 1 and "),
        ("uplink: {momentum: 0.9, error_feedback: false}", [], "x.yaml:1: uplink.momentum: corr"),
        ("uplink: {momentum: 0.9}", ["pruning.method=none"], "x.yaml:1: uplink.momentum: does"),
        ("pruning: {method: none, warmup: [0.5]}", [], "x.yaml:1: pruning.warmup: method none "),
        ("pruning: {client_densities: [0.5]}", ["pruning.method=threshold"], "x.yaml:1: "
         "pruning.client_densities: method threshold has no density"),
        ("clients: {total: 1, per_round: 1}\npruning: {client_densities: [0.5, 1]}", [], "x.yaml:2:"
         " pruning.client_densities: more densities than clients.total=1"),
        ("pruning: {method: threshold, relative: true, threshold: 1}", [], "x.yaml:1: "
         "pruning.threshold: nothing is above the largest"),
        ("uplink: {dense_below: 9}", ["pruning.method=random"], "x.yaml:1: uplink.dense_below: "
         "pruning.method random leaves no tensor whole"),
        *((f"downlink: {{values: {word}}}", [], f"x.yaml:1: downlink.values: {word} ruins a whole ")
          for word in ("sign", "ternary", "powersgd(4)", "int2", "qsgd2")),
        ("server:\n  scheduler_options: {gamma: 1}", [], "x.yaml:2: server.scheduler_options: "
         "given without server.scheduler"),
    ],
)  # fmt: skip
def test_contradictions(text, overrides, message):
    assert mistake(text, *overrides).startswith(message)


VALUES = ["fp32", "fp16", "bf16", "int2", "int8", "int16", "qsgd2", "qsgd8", "ternary", "sign"]
VALUES += ["eden1", "eden4", "bounded(0.01)", "bounded(1e-3)", "powersgd(1)", "powersgd(64)"]
NO_VALUES = ["int1", "int17", "qsgd9", "eden5", "fp64", "powersgd(0)", "powersgd", "bounded()", ""]


@pytest.mark.parametrize("word", VALUES)
def test_values_that_codecs_know_are_words_of_the_config(word):
    parse_values(word)
    both = [f"uplink.values={word}", f"downlink.values={word}"]
    load("", *both, "pruning.method=none", "downlink.mode=change")


@pytest.mark.parametrize("word", NO_VALUES)
def test_values_that_codecs_do_not_know_are_refused(word):
    with pytest.raises(ValueError):
        parse_values(word)
    message = f"command line: uplink.values: {word!r} is none of the forms fp32, fp16, "
    assert mistake("", f"uplink.values={word}").startswith(message)


def test_what_looks_like_a_contradiction_and_is_none():
    load("", "uplink.momentum=0.9", "local.steps=1", "local.momentum=0")
    load("", "downlink.mode=change", "downlink.pruning.method=topk", "pruning.warmup=[0.25,1]")
    load("", "pruning.method=threshold", "pruning.threshold=1", "downlink.values=int3")
    load("", "clients.total=10", "clients.per_round=10")
    load("", "local.nesterov=true", "model.norm=group(32)", "name=A-1_b.c")
    load("", "local.lr_schedule.name=step", "local.lr_schedule.milestones=[3]")
    load("", "server.scheduler=StepLR", "server.scheduler_options.step_size=3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nseed: 1\nname: y", "x.yaml:3: not valid YAML: found duplicate key name"),
        ("local:\n  lr: 1\n  lr: 2", "x.yaml:3: not valid YAML: found duplicate key lr"),
        ("name: x\n\tseed: 1", "x.yaml:2: not valid YAML: "),
        ("local: {lr: 1", "x.yaml:1: not valid YAML: "),
        ("seed: 1\n---\nseed: 2", "x.yaml:2: not valid YAML: "),
        ("name: !!python/name:os.system", "x.yaml:1: not valid YAML: the tag "),
        ("[a, b]", "x.yaml:1: a config is a list of `key: value` lines"),
        ("hello", "x.yaml:1: a config is a list of `key: value` lines"),
        ("data: &d\n  partition: *d", "x.yaml: not valid YAML: nested too deeply"),
        ("server: {options: &o {a: *o}}", "x.yaml: not valid YAML: nested too deeply"),
        (f"trackers: {'[' * 10000}", "x.yaml: not valid YAML: nested too deeply"),
        ("seed: !!int 3", "x.yaml:1: not valid YAML: the tag "),
        ("seed: 1\n? [a]\n: 2", "x.yaml:2: not valid YAML: a key must be a word"),
        ("seed: 1\0", "x.yaml: not valid YAML: "),
    ],
)
def test_what_is_not_a_mapping_of_yaml(text, message):
    assert mistake(text).startswith(message)


def test_files_that_cannot_be_read(tmp_path):
    for path, bytes_ in (("none.yaml", None), (".", None), ("latin.yaml", b"name: \xe9")):
        if bytes_:
            Path(path).write_bytes(bytes_)
        with pytest.raises(ConfigError) as error:
            load_config(Path(path), [])
        assert str(error.value).startswith(f"{path}: cannot be read: ")


@pytest.mark.parametrize("override", ["foo", "=3", "--x", "a b=3", "1a=2", ".lr=1", "local.lr"])
def test_what_is_no_override(override):
    message = f"command line: {override!r} is not of the form key=value"
    assert mistake("", "seed=1", override) == message


@pytest.mark.parametrize(
    "override",
    [
        "pruning.warmup=[1",
        "pruning.warmup=[1] 2",
        "pruning.warmup=[1] # 2",
        "server.options={a: 1, a: 2}",
        "server.options.a='b",
    ],
)
def test_an_override_that_is_not_yaml(override):
    assert mistake("", override).startswith(f"command line: {override}: ")


# --- seeds ----------------------------------------------------------------------------------------


def test_seeds_are_the_same_on_every_machine_and_forever():
    config = Config(seed=1)
    assert config.seed_for("training", 3, 7) == 1395668248391941273
    assert config.seed_for("network") == 7503469782132752027
    assert config.seed_for("network", 0, 0) == 7503469782132752027
    assert Config(seed=0).seed_for("cohort", 1) == 7219566367586880376


def test_every_stream_has_a_seed_of_its_own():
    seeds = [
        Config(seed=seed).seed_for(purpose, round, client)
        for seed in (0, 1, 11)
        for purpose in ("training", "cohort", "network")
        for round in (0, 1, 11)
        for client in (0, 1, 11)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert math.log2(max(seeds)) > 60


# --- the command line -----------------------------------------------------------------------------


def test_the_command_line(tmp_path):
    Path("default.yaml").write_text("seed: 3")
    Path("other.yaml").write_text("seed: 4")
    default = str(tmp_path / "default.yaml")
    assert read_command_line(default, []) == (Config(seed=3), False)
    given = ["rounds=2", "--config", "other.yaml", "--local_rank=0", "--dry_run", "name=x"]
    assert read_command_line(default, given) == (Config(seed=4, rounds=2, name="x"), True)


def test_a_mistake_on_the_command_line_is_one_line_and_exit_2(capsys):
    with pytest.raises(SystemExit) as end:
        read_command_line("configs/default.yaml", ["locla.lr=1"])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    expected = "error: command line: locla: no such key; did you mean 'local'?\n"
    assert (out, err) == ("", expected)


def test_main_answers_a_mistake_without_importing_torch():
    command = [sys.executable, "-X", "importtime", "main.py", "rounds=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert lines == ["error: command line: rounds: 0 is out of range; at least 1"]
    assert "| torch" not in done.stderr
