"""graphs.py with a stand-in for CUDA graphs."""

import pytest
import torch
from helpers.dispatch import StandIn
from helpers.noise import CPU

from training.graphs import Graphs, recorder


def test_a_step_on_a_cpu_is_its_own_recording():
    assert recorder(CPU)(print) is print


def test_recording_leaves_the_state_as_it_was():
    state = torch.zeros(2)

    def step():
        state.add_(1.0)
        return state.sum()

    graphs = Graphs([state], StandIn())
    assert [float(graphs.run("key", step)) for _ in range(3)] == [2.0, 4.0, 6.0]
    assert float(graphs.run("key", lambda: None)) == 8.0  # the step that was recorded
    assert float(graphs.run("other", step)) == 10.0


def test_memory_that_runs_out_is_no_step_that_cannot_be_recorded(capsys):
    def run_out(_):
        raise torch.OutOfMemoryError

    graphs = Graphs([], run_out)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.run("key", lambda: None)
    assert graphs.can_record and not graphs.recorded and not capsys.readouterr().err


def test_a_step_that_cannot_be_recorded_is_said_once(capsys):
    def fail(_):
        raise RuntimeError("not while a stream is recorded\nmore")

    state = torch.zeros(1)
    graphs = Graphs([state], fail)
    for key in ("a", "b", "a"):
        graphs.run(key, lambda: state.add_(1.0))
    assert float(state) == 3.0
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("without CUDA graphs: not while a stream is recorded")
