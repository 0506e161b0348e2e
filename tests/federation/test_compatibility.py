"""compatibility.py: what slices and local optimizers do not go with is one line; the rest is in
tests/test_config.py.
"""

import pytest
from helpers.configs import load, mistake

from federation.compatibility import doubts

WIDTHS = ["model.name=lenet", "submodel.widths=[1,0.5]"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["submodel.widths=[0.5,0.25]"], "submodel.widths: [0.5, 0.25] must begin with 1"),
        (["submodel.widths=[1,0.25,0.5]"], "must begin with 1 and then go down"),
        (["submodel.widths=[1,0.5,0.5]"], "must begin with 1 and then go down"),
        (["submodel.widths=[1,0]"], "submodel.widths: 0.0 is out of range"),
        (["submodel.widths=[2,1]"], "submodel.widths: 2.0 is out of range"),
        (["submodel.widths=[]", "submodel.ordered_dropout=true"], "need widths, such as [1, 0.5]"),
        (["submodel.assignment=capability"], "submodel.assignment: capability fits widths to"),
        (["model.name=resnet18"], "model.norm_policy: statistics differ from width to width"),
        (["model.name=resnet18", "model.norm_policy=frozen"], "it must be static"),
        (["model.name=resnet18", "model.norm_policy=local"], "it must be static"),
        (
            ["model.name=resnet18", "model.norm=group(2)", "model.norm_policy=local"],
            "model.norm_policy: norm layers of different widths",
        ),
        (["pruning.mask.method=snip"], "pruning.mask.method: snip does not go with"),
        (["pruning.mask.method=dynamic"], "pruning.mask.method: dynamic does not go with"),
        (["local.algorithm=SCAFFOLD"], "local.algorithm: SCAFFOLD does not go with"),
        (["local.algorithm=FedCM"], "local.algorithm: FedCM does not go with"),
        (
            ["local.algorithm=FedDyn", "uplink.error_feedback=false"],
            "local.algorithm: FedDyn does not go with",
        ),
        (["schedule.name=hierarchical"], "schedule.name: hierarchical does not go with"),
        (["schedule.name=fedasync"], "schedule.name: fedasync does not go with"),
        (
            [
                *("schedule.name=gossip", "clients.total=4", "clients.per_round=4"),
                "uplink.error_feedback=false",
            ],
            "schedule.name: gossip does not go with",
        ),
        (["distributed.exchange=allreduce"], "distributed.exchange: allreduce does not go with"),
        (["distributed.engine=deepspeed"], "distributed.engine: deepspeed does not go with"),
        (
            ["submodel.ordered_dropout=true", "local.lanes=2"],
            "local.lanes: ordered_dropout trains one client at a time",
        ),
    ],
)
def test_what_slices_do_not_go_with(words, message):
    assert message in mistake("", *WIDTHS, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [
                *("schedule.name=gossip", "clients.total=4", "clients.per_round=4"),
                "uplink.error_feedback=false",
            ],
            "gossip scores every node's model",
        ),
        (["distributed.ranks_per_client=2"], "each rank's BatchNorm would see a part"),
    ],
)
def test_what_static_batch_norm_does_not_go_with(words, message):
    assert message in mistake("", "model.norm_policy=static", *words)


@pytest.mark.parametrize(
    "words",
    [
        ["local.algorithm=FedProx"],
        ["local.algorithm=FedNova"],
        ["server.optimizer=FedAdam"],
        ["schedule.name=fedbuff"],
        ["schedule.over_selection=1.5", "schedule.deadline_seconds=9"],
        ["submodel.assignment=capability", "schedule.deadline_seconds=9"],
        ["submodel.ordered_dropout=true"],
        ["model.name=resnet18", "model.norm_policy=static"],
        ["model.name=resnet18", "model.norm=group(2)"],
        ["downlink.mode=change", "downlink.values=int8"],
        ["downlink.mode=copies", "downlink.values=int8"],
    ],
)
def test_what_slices_go_with(words):
    load("", *WIDTHS, *words)


COPIES = "downlink.mode=copies"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["local.algorithm=SCAFFOLD"], "downlink.mode: SCAFFOLD sends a vector besides the model"),
        (["local.algorithm=FedCM"], "downlink.mode: FedCM sends a vector besides the model"),
        (["schedule.name=fedbuff"], "downlink.mode: with fedbuff clients begin at any time"),
        (
            ["schedule.late=carry", "schedule.deadline_seconds=9"],
            "downlink.mode: with schedule.late: carry clients may leave",
        ),
        (["schedule.name=hierarchical"], "downlink.mode: hierarchical has no one server"),
    ],
)
def test_what_copies_do_not_go_with(words, message):
    assert message in mistake("", COPIES, *words)


@pytest.mark.parametrize(
    "words",
    [
        ["local.algorithm=FedDyn", "uplink.error_feedback=false"],
        ["downlink.pruning.method=threshold", "downlink.pruning.threshold=0.01"],
        ["downlink.values=sign"],  # of what is owed
        ["schedule.deadline_seconds=9", "network.availability.dropout=0.1"],
        ["pruning.mask.method=dynamic"],
        ["schedule.name=semi_synchronous"],
    ],
)
def test_what_copies_go_with(words):
    load("", COPIES, *words)


ADAMW = "local.optimizer=AdamW"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["local.optimizer=adamw"], "local.optimizer: no optimizer of torch.optim is called"),
        (["local.optimizer=adamw"], "did you mean 'AdamW'?"),
        (["local.optimizer=FedAdam"], "did you mean 'Adam'?"),  # which is a server's
        (["local.optimizer=LBFGS"], "local.optimizer: LBFGS cannot be used: "),
        (["local.optimizer=Muon"], "local.optimizer: Muon cannot be used: "),
        ([ADAMW, "local.optimizer_options.beta=1"], "local.optimizer_options.beta: AdamW has no"),
        ([ADAMW, "local.optimizer_options.lr=1"], "local.optimizer_options.lr: lr is local.lr"),
        ([ADAMW, "local.optimizer_options.betas=[1,1]"], "Invalid beta parameter at index 0"),
        ([ADAMW, "local.momentum=0"], "local.momentum: is SGD's; what AdamW takes stands in"),
        ([ADAMW, "local.momentum=0.5", "local.nesterov=true"], "local.momentum: is SGD's"),
        ([ADAMW, "local.nesterov=true"], "local.nesterov: is SGD's; what AdamW takes stands in"),
        ([ADAMW, "local.weight_decay=0.1"], "local.weight_decay: is SGD's; what AdamW takes"),
        (["local.optimizer_options.dampening=1"], "local.optimizer_options.dampening: SGD takes"),
        ([ADAMW, "uplink.momentum=0.9", "local.steps=1"], "uplink.momentum: is of SGD's gradients"),
        ([ADAMW, "local.algorithm=SCAFFOLD"], "local.algorithm: SCAFFOLD takes update / (lr"),
        ([ADAMW, "local.algorithm=FedNova"], "local.algorithm: FedNova takes update / (lr"),
        ([ADAMW, "local.algorithm=FedCM"], "local.algorithm: FedCM takes update / (lr"),
        (["local.optimizer_state=kept"], "local.optimizer_state: SGD begins anew in each round"),
        (
            [ADAMW, "local.optimizer_state=kept", "pruning.mask.method=dynamic"],
            "local.optimizer_state: kept moments would move weights",
        ),
        (
            [
                *(ADAMW, "local.optimizer_state=kept", "uplink.error_feedback=false"),
                *("schedule.name=gossip", "clients.total=4", "clients.per_round=4"),
            ],
            "local.optimizer_state: gossip's nodes keep models alone",
        ),
        ([ADAMW, "local.lanes=4"], "local.lanes: AdamW trains one client at a time"),
        ([ADAMW, "distributed.engine=deepspeed"], "local.optimizer: DeepSpeed's engine takes SGD"),
    ],
)
def test_what_a_local_optimizer_does_not_go_with(words, message):
    assert message in mistake("", *words)


def test_a_local_optimizer_takes_its_own_options():
    more = ["local.optimizer_options.weight_decay=0.1", "local.optimizer_options.betas=[0.9,0.95]"]
    local = load("", ADAMW, *more, "local.algorithm=FedProx", "local.lanes=1", "local.clip=1").local
    assert local.optimizer_options == {"weight_decay": 0.1, "betas": [0.9, 0.95]}


RESNET = ["model.name=resnet18", "server.optimizer=FedYogi"]


@pytest.mark.parametrize(
    ("words", "doubted"),
    [
        (RESNET, True),
        (["model.name=resnet18", "server.lr=0.5"], True),
        (["model.name=resnet18"], False),
        ([*RESNET, "model.norm_policy=static"], False),
        ([*RESNET, "model.norm=group(2)"], False),
        ([*RESNET, "local.steps=1"], False),
        (["model.name=lenet", "server.optimizer=FedYogi"], False),
    ],
)
def test_an_adaptive_server_beside_averaged_statistics_is_doubted(words, doubted):
    found = list(doubts(load("", *words)))
    assert len(found) == doubted
    assert all("set model.norm_policy: static" in doubt for doubt in found)
