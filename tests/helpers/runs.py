"""Runs that are small enough to train in a second, in this process and in others."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

CIFAR10 = REPOSITORY.parent / "shared" / "data"  # the real pictures, where there are any

TINY = [
    "data.name=digits",
    "data.fallback=",
    "model.name=lenet",
    "model.norm_policy=average",  # so that tests of a ResNet have buffers on the wire
    "clients.total=4",
    "clients.per_round=3",
    "local.steps=2",
    "local.batch_size=16",
    "local.lr=0.05",
    "pruning.density=0.05",
    "downlink.mode=model",
    "downlink.values=fp32",
    "downlink.pruning.method=none",
    "server.optimizer=FedYogi",
    "precision=fp32",
    "rounds=4",
    "checkpoint.every=2",
    "trackers=[]",
]


def launch(*command: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run a command of the repository with one thread per process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout
    )


def tiny_command(folder: Path, *overrides: str) -> list[str]:
    """The words after `python` for a tiny run below `folder`."""
    return ["main.py", *TINY, f"output_dir={folder}", "name=tiny", *overrides]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def rounds(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


PYTHON = sys.executable

SCRIPTS = Path(sys.executable).parent  # torchrun, accelerate and deepspeed of this environment


def make_federation(folder, *overrides, name="tiny"):
    """What a tiny run holds in memory before its first round."""
    from command_line import load_config
    from distributed import Ranks
    from federation.schedules import make_schedule

    fixed = [*TINY, f"output_dir={folder}", f"name={name}", *overrides]
    config = load_config(REPOSITORY / "configs/default.yaml", fixed)
    config.run_folder.mkdir(parents=True)
    return make_schedule(config, Ranks(config), config.run_folder / "clients")


def ledger(folder):
    with open(folder / "ledger.csv", newline="") as file:
        return list(csv.DictReader(file))


PLAIN = ["pruning.method=none", "uplink.values=fp32", "uplink.error_feedback=false"]

PLAIN += ["server.optimizer=FedAvg", "local.momentum=0", "local.weight_decay=0"]


def make_plain_federation(folder, *overrides, name="tiny"):
    """The same where nothing is compressed and the server and the clients only do plain SGD."""
    return make_federation(folder, *PLAIN, *overrides, name=name)


def kinds(rows) -> set[tuple[str, str]]:
    """(direction, kind) of all messages in these rows of a ledger."""
    return {(row.direction, row.kind) for row in rows}


def damage_first(monkeypatch, kind="update"):
    """From now on the payload of this kind of each cohort's first client arrives damaged."""
    from federation.server import Average

    decode = Average.decode

    def damage(self, report, round_number):
        if report.client == min(self.weights):
            report.messages = [wounded(m) if m.kind == kind else m for m in report.messages]
        return decode(self, report, round_number)

    def wounded(message):
        payload = bytearray(message.payload)
        payload[40] ^= 1
        return replace(message, payload=bytes(payload))

    monkeypatch.setattr(Average, "decode", damage)


def killed_before_logging(run, monkeypatch, nth_round: int, *words: str) -> Path:
    """The folder of a run that dies as it logs a round, and goes on by the same command.

    run: the fixture; nth_round: the round, by order of logging, that is lost.
    """
    from run_folder import RunFolder

    append, calls = RunFolder.append, []

    def dies(self, *rest):
        calls.append(rest)
        if len(calls) == nth_round:
            raise MemoryError
        return append(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", dies)
        with pytest.raises(MemoryError):
            run(*words, name="killed")
    status, folder = run(*words, name="killed")
    assert status == 0
    return folder


def note_what_is_owed(federation, monkeypatch) -> dict:
    """By client, as it trains: its update and what it owed before, all that it is to send."""
    import torch

    owed, store = {}, federation.clients.store
    encode = federation.clients.uplink.encode

    def note(trained, *rest):
        client = trained.report.client
        before = store.get(client).get("residual", torch.zeros_like(trained.update))
        owed[client] = trained.update + before
        return encode(trained, *rest)

    monkeypatch.setattr(federation.clients.uplink, "encode", note)
    return owed
