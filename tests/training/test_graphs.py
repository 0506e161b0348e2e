"""graphs.py with a stand-in for CUDA graphs."""

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
