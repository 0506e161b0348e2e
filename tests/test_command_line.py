"""command_line.py: the name of a run, and what main.py takes and refuses."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.configs import load
from helpers.runs import REPOSITORY as ROOT
from PIL import Image

from command_line import read_command_line
from config import Config


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder, as somebody who stands elsewhere does."""
    monkeypatch.chdir(tmp_path)


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
    words += ["network.latency_ms=7", "pruning.density=0.001"]
    names = [name("", *words, f"rounds={rounds}") for rounds in range(100, 300)]
    assert len(set(names)) == len(names)
    start = "base+per_round=5+total=50+batch_size=16+name=lenet+latency_ms=7.0+density=0.001"
    for rounds, found in enumerate(names, start=100):
        assert re.fullmatch(re.escape(f"{start}+rounds={rounds}-") + "[0-9a-f]{10}", found)
    assert name("", *reversed(words), "rounds=107") == names[7]
    words += ["local.steps=5", "uplink.values=fp16", "server.optimizer=FedYogi"]
    longer = [name("", *words, f"rounds={rounds}") for rounds in range(100, 120)]
    assert len(set(longer)) == len(longer) and {len(found) for found in longer} == {120}


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


# --- arguments ------------------------------------------------------------------------------------


def test_the_command_line(tmp_path):
    Path("default.yaml").write_text("seed: 3")
    Path("other.yaml").write_text("seed: 4")
    default = str(tmp_path / "default.yaml")
    assert read_command_line(default, []) == (Config(seed=3), False)
    given = ["rounds=2", "--config", "other.yaml", "--local_rank=0", "--dry_run", "name=x"]
    assert read_command_line(default, given) == (Config(seed=4, rounds=2, name="x"), True)


@pytest.mark.parametrize(
    "words", [["--local-rank=1"], ["--local-rank", "1"], ["--local_rank", "1"], ["--local_rank=x"]]
)
def test_the_words_of_launchers_are_let_pass(words):
    config, _ = read_command_line("configs/default.yaml", [*words, "rounds=2"])
    assert config.rounds == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dry-run"], "there is no option --dry-run; did you mean --dry_run?"),
        (["--dry"], "there is no option --dry; did you mean --dry_run?"),
        (["--seed=3"], "there is no option --seed=3; a key stands without dashes: seed=3"),
        (["rounds=2", "--server.lr", "1"], "there is no option --server.lr; a key stands without "),
        (["--config"], "argument --config: expected one argument; see --help"),
        (["name=\udcff"], "name: '\\udcff' is not UTF-8 text"),
        (["\udcff=1"], "'\\udcff=1' is not of the form key=value"),
        (["data.root=/tmp/\udce9"], "data.root: '/tmp/\\udce9' is not UTF-8 text"),
        (["server.options.x=\udcff"], "server.options.x: '\\udcff' is not UTF-8 text"),
        (["name=a\nb"], "name: 'a\\nb' must be usable as a folder"),
    ],
)
def test_a_word_that_is_not_understood_is_one_line_and_exit_2(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        read_command_line("configs/default.yaml", words)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith(f"error: command line: {message}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.yaml", "name: é".encode("latin-1"), " cannot be read: not UTF-8 text; save it as "),
        ("utf16.yaml", "name: a".encode("utf-16"), " cannot be read: not UTF-8 text; save it as "),
        ("odd\udcff.yaml", b"rounds: 0", "1: rounds: 0 is out of range"),
        ("two\nlines.yaml", b"rounds: 0", "1: rounds: 0 is out of range"),
        ("none\udcff.yaml", None, " cannot be read: No such file or directory; give a YAML file"),
        ("key.yaml", b'"a\\nb\\e[1m": 1', "1: a\\nb\\x1b[1m: no such key; it takes "),
        ("surrogate.yaml", b'name: "\\ud800"', "1: not valid YAML: '\\ud800' is not UTF-8 text"),
        ("nul.yaml", b'data: {root: "a\\0b"}', "1: not valid YAML: 'a\\x00b' is not UTF-8 text"),
    ],
)
def test_text_that_is_not_utf8_is_one_line(name, content, message, capsys):
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(SystemExit) as end:
        read_command_line("configs/default.yaml", ["--config", name])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    assert err.startswith(f"error: {ascii(name)[1:-1]}:{message}")


def test_a_mistake_on_the_command_line_is_one_line_and_exit_2(capsys):
    with pytest.raises(SystemExit) as end:
        read_command_line("configs/default.yaml", ["locla.lr=1"])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    expected = "error: command line: locla: no such key; did you mean 'local'?\n"
    assert (out, err) == ("", expected)


def test_a_working_directory_that_is_gone(tmp_path):
    code = "import os; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone'); "
    code += "from command_line import read_command_line; read_command_line('x.yaml', [])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the working directory is gone; change to one that is there\n"


def test_main_answers_a_mistake_without_importing_torch():
    command = [sys.executable, "-X", "importtime", "main.py", "rounds=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert lines == ["error: command line: rounds: 0 is out of range; at least 1"]
    assert "| torch" not in done.stderr


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
