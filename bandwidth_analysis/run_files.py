"""Read the files of a run folder: mappings, the rounds' rows and the ledger, each checked alone."""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import yaml

from bandwidth_analysis.errors import REPAIR, AnalysisError

# The columns of the ledger that are read, wherever they stand, and numpy's types for them.
LEDGER_FIELDS = {"round": "i8", "direction": "U5", "kind": "U32"}
LEDGER_FIELDS |= dict.fromkeys(("bytes", "dense_bytes", "num_values"), "i8")
NUMBER = (int, float)
NUMBER_OR_NULL = (int, float, type(None))
MEANS = ("waited_seconds", "link_utilisation", "device_utilisation")  # taken over the rounds
MAPPINGS = ("phase_seconds", "bytes_by_part", "bytes_by_tensor")  # of names to numbers
# What a row of rounds.jsonl says that lacks one of these keys.
OPTIONAL: dict[str, Any] = dict.fromkeys((*MEANS, "residual_norm")) | dict.fromkeys(MAPPINGS, {})
OPTIONAL |= {"late": [], "failures": {}}


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise AnalysisError(f"{path}: cannot be read ({error.strerror}); {REPAIR}") from None
    except UnicodeDecodeError:
        raise AnalysisError(f"{path}: damaged, not text; {REPAIR}") from None


def read_mapping(path: Path, parse: Callable[[str], Any]) -> dict:
    """Read the mapping that a YAML or JSON file holds."""
    try:
        mapping = parse(text_of(path))
    except (ValueError, RecursionError, yaml.YAMLError):
        raise AnalysisError(f"{path}: damaged or half-written; {REPAIR}") from None
    if not isinstance(mapping, dict):
        raise AnalysisError(f"{path}: damaged, holds no keys; {REPAIR}")
    return mapping


def get(mapping: dict, key: str, kind: type | tuple[type, ...], source: Path | str) -> Any:
    """Return mapping[key]; raise AnalysisError if it is missing or is not of the kind."""
    if key not in mapping or not isinstance(mapping[key], kind):
        found = repr(mapping[key]) if key in mapping else "nothing"
        raise AnalysisError(f"{source}: '{key}' has no usable value (found {found}); {REPAIR}")
    return mapping[key]


def read_rounds(path: Path, may_be_missing: bool) -> list[dict]:
    """Read the rows of rounds.jsonl and check that they count 1, 2, 3 and so on.

    A last line that a kill cut off is left out.
    """
    if may_be_missing and not path.exists():
        return []
    lines = text_of(path).split("\n")
    rows = []
    # The text after the last newline is either empty or a line that a kill cut off.
    for round_number, line in enumerate(lines[:-1], start=1):
        source = f"{path}:{round_number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise AnalysisError(f"{source}: damaged line; {REPAIR}") from None
        if not isinstance(row, dict) or row.get("round") != round_number:
            raise AnalysisError(f"{source}: should be round {round_number}; {REPAIR}")
        for key in ("bytes_up", "bytes_down", "simulated_seconds", "wall_seconds"):
            get(row, key, NUMBER, source)
        get(row, "test_accuracy", NUMBER_OR_NULL, source)
        row = OPTIONAL | row
        for key, otherwise in OPTIONAL.items():
            get(row, key, NUMBER_OR_NULL if otherwise is None else type(otherwise), source)
        for key in MAPPINGS:
            for name in row[key]:
                get(row[key], name, NUMBER, f"{source}: {key}")
        rows.append(row)
    return rows


def read_ledger(path: Path, may_be_missing: bool) -> np.ndarray:
    """Read the LEDGER_FIELDS of each message; a last line that a kill cut off is left out."""
    dtype = np.dtype(list(LEDGER_FIELDS.items()))
    if may_be_missing and not path.exists():
        return np.empty(0, dtype)
    try:
        with path.open(encoding="utf-8") as file:
            header = file.readline().strip().split(",")
            columns = [header.index(field) for field in LEDGER_FIELDS]
            ledger = _parse_ledger(file, dtype, columns)
    except OSError as error:
        raise AnalysisError(f"{path}: cannot be read ({error.strerror}); {REPAIR}") from None
    except ValueError as error:
        raise AnalysisError(f"{path}: damaged ({str(error).splitlines()[0]}); {REPAIR}") from None
    if not np.isin(ledger["direction"], ("up", "down")).all():
        raise AnalysisError(f"{path}: damaged, a direction is neither up nor down; {REPAIR}")
    if min(ledger[field].min(initial=0) for field in ("bytes", "dense_bytes", "num_values")) < 0:
        raise AnalysisError(f"{path}: damaged, a number of bytes or values is negative; {REPAIR}")
    if ledger["round"].min(initial=1) < 0:
        raise AnalysisError(f"{path}: damaged, a round is below 0; {REPAIR}")
    ledger["round"] = np.maximum(ledger["round"], 1)  # messages before round 1 count with round 1
    return ledger


def _parse_ledger(file: TextIO, dtype: np.dtype, columns: list[int]) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no data", category=UserWarning)
        return np.loadtxt(
            _whole_lines(file), dtype, comments=None, delimiter=",", usecols=columns, ndmin=1
        )


def _whole_lines(file: TextIO) -> Iterator[str]:
    return (line for line in file if line.endswith("\n"))
