"""config.py: precedence, ranges, contradictions and seeds."""

import dataclasses
import math
from pathlib import Path

import pytest
from helpers.configs import load, mistake
from helpers.runs import REPOSITORY as ROOT

from command_line import load_config
from compression import parse_coder
from config import Config


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder, as somebody who stands elsewhere does."""
    monkeypatch.chdir(tmp_path)


def test_defaults_then_yaml_then_command_line():
    assert load() == Config()
    text = "rounds: 20\nlocal:\n  lr: 0.3\n  lr_schedule:\n    name: cosine\n"
    config = load(text, "local.lr=0.2", "server.optimizer=FedYogi", "clients.total=50")
    assert config.local.lr == 0.2  # command line over YAML
    assert config.rounds == 20 and config.local.lr_schedule.name == "cosine"  # YAML over defaults
    assert config.clients.total == 50 and config.server.optimizer == "FedYogi"
    assert config.local.momentum == 0.9 and config.local.lr_schedule.gamma == 0.1  # defaults
    assert load("rounds: 20", "rounds=1", "rounds=2").rounds == 2  # the last one counts


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


def test_the_run_folder_is_the_same_from_wherever_a_run_is_started(monkeypatch):
    assert load().run_folder == ROOT / "outputFolder/run-s1"
    monkeypatch.chdir(ROOT)
    assert Config().run_folder == Path("outputFolder/run-s1")  # short, where one stands above it
    assert Config(output_dir="../x").run_folder == ROOT.parent / "x/run-s1"


# --- mistakes -------------------------------------------------------------------------------------


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
    *[f"network.{key}=-1" for key in ("jitter_ms", "loss", "spread", "availability.dropout")],
    *[f"network.{key}=0" for key in ("memory_gib", "server_egress_mbps", "server_ingress_mbps")],
    *[f"network.availability.{key}=0" for key in ("period_hours", "share")],
    *[f"network.{key}=1.1" for key in ("loss", "availability.share", "availability.dropout")],
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
    names = "resnet18, resnet50, resnet18v2, cnn, lenet"
    message = f"x.yaml:2: model.name: 'resnet19' is not one of {names}"
    assert mistake("model:\n  name: resnet19") == message
    for key in ("device", "precision", "model.name", "model.stem"):
        assert mistake("", f"{key}=X").startswith(f"command line: {key}: 'X' is not one of ")
    for key in ("local.lr_schedule.name", "pruning.method", "pruning.scope"):
        assert mistake("", f"{key}=X").startswith(f"command line: {key}: 'X' is not one of ")
    for key in ("downlink.mode", "server.weighting", "checkpoint.resume"):
        assert mistake("", f"{key}=X").startswith(f"command line: {key}: 'X' is not one of ")


def test_an_output_folder_must_have_a_name():
    assert mistake("", "output_dir=") == "command line: output_dir: names no folder"


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
        ("local:\n  lanes: many", [], "x.yaml:2: local.lanes: 'many' is neither auto nor "),
        ("", ["local.lanes=0"], "command line: local.lanes: '0' is neither auto nor "),
        ("local:\n  lanes: 4", ["precision=fp16"], "x.yaml:2: local.lanes: precision: fp16 trains "
         "one client at a time; use local.lanes: 1"),
        ("", ["local.lanes=2", "distributed.ranks_per_client=2"], "command line: local.lanes: "
         "distributed.ranks_per_client above 1 trains one client at a time"),
        ("", ["local.lanes=2", "distributed.engine=deepspeed"], "command line: local.lanes: "
         "distributed.engine: deepspeed trains one client at a time"),
        ("", ["deterministic=yes"], "command line: deterministic: 'yes' is not one of auto, "),
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
         "the model can be sent only in downlink.mode change"),
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
        ("pruning: {method: random, scope: chunk}", [], "x.yaml:1: "
         "pruning.scope: a random choice is global or by layer"),
        ("uplink: {dense_below: 9}", ["pruning.method=random"], "x.yaml:1: uplink.dense_below: "
         "pruning.method random leaves no tensor whole"),
        *((f"downlink: {{values: {word}}}", [], f"x.yaml:1: downlink.values: {word} ruins a whole ")
          for word in ("sign", "ternary", "means2", "means3", "powersgd(4)", "int2", "qsgd2")),
        ("server:\n  scheduler_options: {gamma: 1}", [], "x.yaml:2: server.scheduler_options: "
         "given without server.scheduler"),
    ],
)  # fmt: skip
def test_contradictions(text, overrides, message):
    assert mistake(text, *overrides).startswith(message)


GOSSIP = ["schedule.name=gossip", "uplink.error_feedback=false"]


@pytest.mark.parametrize("name", ["hierarchical", "gossip"])
@pytest.mark.parametrize(
    ("word", "key", "message"),
    [
        ("schedule.over_selection=2", "", "waits for all"),
        ("schedule.deadline_seconds=9", "", "waits for all"),
        ("schedule.sampling=oort", "", "waits for all"),
        ("network.availability.name=diurnal", "network.availability", "nobody may leave"),
        ("network.availability.dropout=0.1", "network.availability", "nobody may leave"),
        ("network.server_egress_mbps=9", "", "do not pass the server"),
        ("network.server_ingress_mbps=9", "", "do not pass the server"),
        ("pruning.mask.method=snip", "", "a mask needs one server"),
        ("downlink.mode=change", "", "no one server that knows"),
        ("local.algorithm=SCAFFOLD", "", "takes FedAvg and FedProx"),
    ],
)
def test_what_belongs_to_a_star_is_refused_elsewhere(name, word, key, message):
    words = [f"schedule.name={name}", "uplink.error_feedback=false", word]
    found = mistake("", *words)
    assert found.startswith(f"command line: {key or word.partition('=')[0]}: ") and message in found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*GOSSIP, "clients.per_round=5"], "clients.per_round: in gossip every node trains"),
        ([*GOSSIP, "server.optimizer=FedYogi"], "server: gossip has no server"),
        ([*GOSSIP, "downlink.values=fp16"], "downlink.values: gossip has no downlink"),
        (["schedule.name=gossip"], "uplink.error_feedback: CHOCO-SGD itself makes up"),
        ([*GOSSIP, "schedule.gossip=D-PSGD"], "pruning.method: D-PSGD sends whole models"),
        (
            [*GOSSIP, "schedule.gossip=D-PSGD", "pruning.method=none", "uplink.values=sign"],
            "uplink.values: sign ruins a whole model: it needs CHOCO-SGD",
        ),
        ([*GOSSIP, "model.norm_policy=local"], "model.norm_policy: in gossip each node"),
        ([*GOSSIP, "distributed.ranks_per_client=2"], "distributed.ranks_per_client: "),
        ([*GOSSIP, "distributed.exchange=allreduce"], "distributed.exchange: gossip has no sum"),
        ([*GOSSIP, "schedule.graph=file"], "schedule.graph_file: goes with schedule.graph: file"),
        ([*GOSSIP, "schedule.graph_file=a.csv"], "schedule.graph_file: goes with"),
        (["schedule.name=hierarchical", "schedule.edge_link=edgebox"], "schedule.edge_link: "),
        (["schedule.name=hierarchical", "network.uplink_trace=a"], "network.uplink_trace: "),
        (["schedule.name=hierarchical", "server.optimizer=FedExP"], "server.optimizer: FedExP "),
    ],
)
def test_what_topologies_do_not_take(words, message):
    assert message in mistake("", "model.norm=group(2)", *words)


VALUES = ["fp32", "fp16", "bf16", "int2", "int8", "int16", "qsgd2", "qsgd8", "ternary", "sign"]
VALUES += [
    "means2",
    "means4",
    "eden1",
    "eden4",
    "bounded(0.01)",
    "bounded(1e-3)",
    "powersgd(1)",
    "powersgd(64)",
]
NO_VALUES = [
    "means1",
    "means5",
    "int1",
    "int17",
    "qsgd9",
    "eden5",
    "fp64",
    "powersgd(0)",
    "powersgd",
    "bounded()",
    "",
]


@pytest.mark.parametrize("word", VALUES)
def test_values_that_codecs_know_are_words_of_the_config(word):
    parse_coder(word)
    both = [f"uplink.values={word}", f"downlink.values={word}"]
    load("", *both, "pruning.method=none", "downlink.mode=change")


@pytest.mark.parametrize("word", NO_VALUES)
def test_values_that_codecs_do_not_know_are_refused(word):
    with pytest.raises(ValueError):
        parse_coder(word)
    message = f"command line: uplink.values: {word!r} is no way to send values; valid are fp32, "
    assert mistake("", f"uplink.values={word}").startswith(message)


def test_what_looks_like_a_contradiction_and_is_none():
    load("", "uplink.momentum=0.9", "local.steps=1", "local.momentum=0")
    load("", "downlink.mode=change", "downlink.pruning.method=topk", "pruning.warmup=[0.25,1]")
    load("", "pruning.method=threshold", "pruning.threshold=1", "downlink.values=int3")
    load("", "clients.total=10", "clients.per_round=10")
    load("", "local.nesterov=true", "model.norm=group(32)", "name=A-1_b.c")
    load("", "local.lanes=1", "precision=fp16", "deterministic=true")
    load("", "local.lr_schedule.name=step", "local.lr_schedule.milestones=[3]")
    load("", "server.scheduler=StepLR", "server.scheduler_options.step_size=3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["local.algorithm=FedProks"], "local.algorithm: no algorithm is called 'FedProks';"),
        (["local.algorithm=FedProx", "local.options.alpha=1"], "local.options.alpha: FedProx has "
         "no setting 'alpha'; it has mu"),
        (["local.options.mu=1"], "local.options.mu: FedAvg has no setting 'mu'; it has none"),
        (["local.algorithm=FedCM", "local.options.alpha=0"], "local.options.alpha: alpha is 0; it"),
        (["local.algorithm=FedProx", "local.options.mu=-1"], "local.options.mu: mu is -1; it"),
        (["local.algorithm=SCAFFOLD", "local.options.option=3"], "local.options.option: option"),
        (["server.optimizer=FedExP", "local.algorithm=FedDyn"], "server.optimizer: FedExP needs "
         "the updates' average; FedDyn makes another step"),
        (["server.optimizer=FedExP", "uplink.values=qsgd2"], "server.optimizer: FedExP would "
         "take the noise of qsgd2 for progress"),
        (["server.optimizer=FedExP", "pruning.method=random", "uplink.error_feedback=false"],
         "server.optimizer: FedExP would take the noise of a random choice for progress"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_by_name(words, message):
    assert mistake("", *words).startswith(f"command line: {message}")


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
