"""graph.py: edges counted by hand, and weights that leave the mean as it is."""

from types import SimpleNamespace

import numpy as np
import pytest

from network.graph import make_graph, metropolis


def graph(name: str, num_nodes: int, seed: int = 0, **settings):
    given = dict(graph=name, edge_probability=0.5, graph_file="") | settings
    return make_graph(SimpleNamespace(**given), num_nodes, seed)


def matrix(weights) -> np.ndarray:
    whole = np.zeros((len(weights), len(weights)))
    for node, row in enumerate(weights):
        for other, weight in row.items():
            whole[node, other] = weight
    return whole


def test_graphs_by_hand(tmp_path):
    assert graph("ring", 4) == [[1, 3], [0, 2], [1, 3], [0, 2]]
    assert graph("ring", 2) == [[1], [0]] and graph("ring", 1) == [[]]
    assert graph("complete", 3) == [[1, 2], [0, 2], [0, 1]]
    # 0 1 2
    # 3 4 5, whose columns are two rows long, so that up and down are one neighbour
    assert graph("torus", 6)[4] == [1, 3, 5] and graph("torus", 9)[4] == [1, 3, 5, 7]
    path = tmp_path / "edges.csv"
    path.write_text("node,neighbour\n0,1\n2,1\n1,0\n")
    assert graph("file", 3, graph_file=str(path)) == [[1], [0, 2], [1]]


def test_a_random_graph_depends_on_its_seed_and_has_as_many_edges_as_it_should():
    one, same, other = (graph("erdos_renyi", 40, seed) for seed in (1, 1, 2))
    assert one == same != other
    assert abs(sum(map(len, one)) / 2 - 390) < 60  # 780 pairs, half of them; deviation 14
    assert all(node in one[other] for node in range(40) for other in one[node])


@pytest.mark.parametrize("name", ["ring", "complete", "torus", "erdos_renyi"])
def test_metropolis_weights_are_doubly_stochastic_and_mix(name):
    weights = matrix(metropolis(graph(name, 12, edge_probability=0.4)))
    np.testing.assert_allclose(weights, weights.T)
    np.testing.assert_allclose(weights.sum(0), 1)
    assert (weights >= 0).all()
    assert np.sort(np.abs(np.linalg.eigvalsh(weights)))[-2] < 1 - 1e-6
    if name == "complete":
        np.testing.assert_allclose(weights, 1 / 12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node,neighbour\n0,1\n2,3\n", "falls apart, no path leads from node 0 to node 2"),
        ("node,neighbour\n0,1\n1,4\n", "edges.csv:3: '4' is not a node, from 0 to 3"),
        ("node,neighbour\n0,-1\n", "edges.csv:2: '-1' is not a node"),
        ("a,b\n0,1\n", "no column 'a' is known"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    path = tmp_path / "edges.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        graph("file", 4, graph_file=str(path))


def test_graphs_that_are_refused():
    with pytest.raises(ValueError, match="7 nodes fill no grid for a torus; use ring"):
        graph("torus", 7)
    with pytest.raises(ValueError, match="falls apart"):
        graph("erdos_renyi", 30, edge_probability=0.01)
