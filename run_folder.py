"""The run folder: everything a run writes, so that a kill loses nothing and a resume is exact.

rounds.jsonl and ledger.csv only grow; a checkpoint remembers how long they were, and a resume cuts
them back to that length, so no row is missing or written twice. The clients' states that a
checkpoint does not name go as well.
"""

import csv
import fcntl
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

from config import NEUTRAL, Config
from federation.client_store import remove_old_states, sync, write_tensors
from federation.ledger import LedgerRow

LEDGER_COLUMNS = [column.name for column in fields(LedgerRow)]
FORMAT = 5  # of checkpoint.pt: raised whenever what it holds changes
LOGS = ("rounds.jsonl", "ledger.csv")
OURS = (*LOGS, "config.yaml", "environment.json", "partition.npz", "checkpoint.pt", "summary.json")
OURS += ("population.csv", "samples.npz", "clients", "plots", "tensorboard")
PACKAGES = ("torch", "torchvision", "accelerate", "deepspeed", "numpy", "flwr-datasets")


class RunFolderError(Exception):
    """The run folder cannot be used; the message says why and what to do."""


class RunFolder:
    """The files of one run. Nothing is written before claim()."""

    def __init__(self, path: Path):
        self.path = path
        self.clients = path / "clients"
        self._lock: IO | None = None

    def refuse_other_runs(self, config: Config) -> dict[str, Any] | None:
        """Return this run's summary if it is here, done. Raises RunFolderError for another run.

        Only a checkpoint or a summary binds: what a start left behind that failed does not.
        """
        finished = (self.path / "summary.json").exists()
        if not finished and config.checkpoint.resume == "never":
            return None
        state = self.checkpoint()
        if state is None:
            if finished:
                raise RunFolderError(
                    f"{self.path}: has summary.json but no checkpoint.pt; restore it, or remove "
                    f"that folder"
                )
            return None
        if key := _first_difference(asdict(config), state["config"]):
            kind = "a finished" if finished else "an unfinished"
            raise RunFolderError(
                f"{self.path}: holds {kind} run with another {key}; choose another name= or "
                f"seed=, or remove that folder"
            )
        return self._read_json("summary.json") if finished else None

    def claim(self, config: Config) -> dict[str, Any] | None:
        """Make the folder this run's; return the checkpoint to go on from, or None.

        Raises RunFolderError: another process works in it, it cannot be written, or its files are
        not what the checkpoint says.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")
        except OSError as error:
            raise RunFolderError(f"output_dir: {self.path}: {error.strerror}") from None
        self._take_lock()
        if config.checkpoint.resume == "never":
            self._clear()
        state = self.checkpoint()
        if state is None:
            self._clear()
        # First make room: the states of a round that was given up may have filled the disk.
        remove_old_states(self.clients, state["clients"] if state else {})
        self._write("config.yaml", config.to_yaml())
        if state is None:
            self._write("rounds.jsonl", "")
            self._write("ledger.csv", ",".join(LEDGER_COLUMNS) + "\n")
        else:
            self._cut_back(state["log_bytes"])
        return state

    def close(self) -> None:
        """Let another process work in the folder."""
        if self._lock:
            self._lock.close()

    def checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint; None before the first. Raises RunFolderError if it is of no use."""
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:
            raise RunFolderError(
                f"{path}: damaged ({type(error).__name__}); remove {self.path} to start again"
            ) from None
        found = state.get("format") if isinstance(state, dict) else None
        if found != FORMAT:
            raise RunFolderError(
                f"{path}: written by other code (its format is {found}, this code's {FORMAT}); "
                f"finish the run with the commit that environment.json names, or remove {self.path}"
            )
        return state

    def environment(self) -> dict[str, Any]:
        """What was recorded when the run first started; empty before that."""
        return self._read_json("environment.json") if self._has("environment.json") else {}

    def write_environment(self, dataset: dict[str, str], **facts: Any) -> None:
        """Record machine, versions, commit and data; a resumed run adds a line of its own."""
        record, before = {"dataset": dataset, **facts, **_machine()}, self.environment()
        if before:
            record = before | {"resumed": [*before.get("resumed", []), _machine()]}
        self._write("environment.json", json.dumps(record, indent=1) + "\n")

    def append(self, row: dict[str, Any], messages: list[LedgerRow]) -> None:
        """Log a round."""
        lines = io.StringIO()
        writer = csv.DictWriter(lines, LEDGER_COLUMNS, lineterminator="\n")
        writer.writerows(map(asdict, messages))
        with open(self.path / "ledger.csv", "a", encoding="utf-8") as ledger:
            ledger.write(lines.getvalue())
        with open(self.path / "rounds.jsonl", "a", encoding="utf-8") as rounds:
            rounds.write(json.dumps(row) + "\n")

    def save(self, config: Config, state: dict[str, Any]) -> None:
        """Write checkpoint.pt, all or nothing, with the logs on the disk before it."""
        lengths = {}
        for name in LOGS:
            with open(self.path / name, "ab") as file:
                os.fsync(file.fileno())
                lengths[name] = file.tell()
        record = {"format": FORMAT, "config": asdict(config), "log_bytes": lengths}
        temporary = self.path / "checkpoint.tmp"
        write_tensors(temporary, state | record)
        sync(temporary)
        os.replace(temporary, self.path / "checkpoint.pt")
        sync(self.path)  # what only the checkpoint before needs may be deleted now

    def ledger_totals(self) -> dict[str, int]:
        """bytes_up, bytes_down, dense_bytes_up, dense_bytes_down, summed over the ledger's rows."""
        totals = dict.fromkeys(("bytes_up", "bytes_down", "dense_bytes_up", "dense_bytes_down"), 0)
        with open(self.path / "ledger.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                totals[f"bytes_{row['direction']}"] += int(row["bytes"])
                totals[f"dense_bytes_{row['direction']}"] += int(row["dense_bytes"])
        return totals

    def finish(self, summary: dict[str, Any], keep_states: bool) -> None:
        """Write summary.json; delete the clients' states unless they are a result."""
        if not keep_states:
            shutil.rmtree(self.clients, ignore_errors=True)
        self._write("summary.json", json.dumps(summary, indent=1) + "\n")

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(f"{self.path}: another process is running this") from None
        except OSError as error:
            print(
                f"warning: {self.path}: this file system has no locks ({error.strerror}); "
                f"start no second process with this run folder",
                file=sys.stderr,
            )

    def _cut_back(self, lengths: dict[str, int]) -> None:
        """Cut the logs back to those lengths. Raises RunFolderError if one is shorter."""
        for name, length in lengths.items():
            path = self.path / name
            found = path.stat().st_size if path.exists() else 0
            if found < length:
                raise RunFolderError(
                    f"{path}: has {found} bytes and the checkpoint counts on {length}; restore the "
                    f"file, or remove {self.path} to start again"
                )
            os.truncate(path, length)

    def _clear(self) -> None:
        logs = [path.name for path in self.path.glob("deepspeed_*.rank*")]
        for name in (*OURS, *logs):
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _has(self, name: str) -> bool:
        return (self.path / name).exists()

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"{path}: cannot be read ({error}); restore the file, or remove {self.path}"
            ) from None
        if not isinstance(found, dict):
            raise RunFolderError(f"{path}: holds no keys; restore the file, or remove {self.path}")
        return found

    def _write(self, name: str, text: str) -> None:
        """All or nothing, also where the power is cut."""
        temporary = self.path / f"{name}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / name)
        sync(self.path)


def _first_difference(ours: dict, theirs: dict, prefix: str = "") -> str:
    """The first dotted key whose values differ, of those that change what a run computes."""
    for key in ours:
        if f"{prefix}{key}" in NEUTRAL:
            continue
        a, b = ours[key], theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            if found := _first_difference(a, b, f"{prefix}{key}."):
                return found
        elif a != b:
            return f"{prefix}{key} ({b!r} there, {a!r} here)"
    return next((f"{prefix}{key}" for key in theirs if key not in ours), "")


def _machine() -> dict[str, Any]:
    return {
        "argv": sys.argv,
        "git": _git(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # DeepSpeed is for Linux only
        return ""


def _git() -> dict[str, Any]:
    """The commit this code stands at and whether files differ from it; empty outside git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        result = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else ""

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except OSError:
        return {}
