"""The scripts of benchmarks/ as modules."""

import importlib

import pytest
from helpers.runs import REPOSITORY


@pytest.fixture
def benchmark(monkeypatch):
    """benchmark(name) is the module of that name, as a script sees it."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module
