"""typed_yaml.py: a value is what its field says, and every mistake is one line with its place."""

from operator import attrgetter
from pathlib import Path

import pytest
from helpers.configs import load, mistake
from helpers.runs import REPOSITORY as ROOT

from command_line import load_config, read_command_line
from config import ConfigError, from_here
from startup.typed_yaml import Settings


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder, as somebody who stands elsewhere does."""
    monkeypatch.chdir(tmp_path)


# --- types ----------------------------------------------------------------------------------------


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
        assert mistake(text, *words).startswith(f"{place}: '{written}' could mean several things; ")


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
    assert "the home folder of an unknown user" in mistake("", "output_dir=~nobody-known/x")
    assert "the home folder of an unknown user" in mistake("data: {root: ~nobody-known/x}")


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
        ("local: 5", [], "x.yaml:1: local: takes keys below it (algorithm, options, "),
        ("seed: 1\nlocal:", [], "x.yaml:2: local: takes keys below it (algorithm, options, "),
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


def test_a_config_with_the_mark_of_utf8_is_read():
    Path("x.yaml").write_bytes("seed: 5".encode("utf-8-sig"))
    assert load_config(Path("x.yaml"), []).seed == 5


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
