"""Who talks to whom where there is no server: connected graphs, and the weights of neighbours."""

from collections.abc import Callable, Iterator
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from network.draws import uniform
from network.table import read_table

Graph = list[list[int]]  # by node, from 0: its neighbours, ascending


def make_graph(
    settings: Any, num_nodes: int, seed: int, locate: Callable[[str], Path] = Path
) -> Graph:
    """The graph that config.py's section `schedule` describes.

    locate: turns a path of the section into one that can be opened.
    Raises ValueError: the nodes cannot be arranged so, a line of the file is wrong, or the graph
    falls apart; OSError.
    """
    edges = {
        "ring": lambda: [(node, (node + 1) % num_nodes) for node in range(num_nodes)],
        "complete": lambda: zip(*np.triu_indices(num_nodes, 1), strict=True),
        "torus": lambda: _torus(num_nodes),
        "erdos_renyi": lambda: _erdos_renyi(num_nodes, settings.edge_probability, seed),
        "file": lambda: _read_edges(locate(settings.graph_file), num_nodes),
    }[settings.graph]()
    neighbours: list[set[int]] = [set() for _ in range(num_nodes)]
    for one, other in edges:
        if one != other:
            neighbours[one].add(int(other))
            neighbours[other].add(int(one))
    graph = [sorted(some) for some in neighbours]
    if lost := _out_of_reach(graph):
        raise ValueError(
            f"schedule.graph: it falls apart, no path leads from node 0 to node {min(lost)}; "
            f"add edges, or raise schedule.edge_probability"
        )
    return graph


def metropolis(graph: Graph) -> list[dict[int, float]]:
    """By node: how much it listens to each neighbour, and to itself.

    Node i listens to neighbour j with 1 / (1 + max(degree_i, degree_j)), and to itself with what is
    left of 1. The matrix is symmetric and its rows sum to 1, so that mixing leaves the mean of all
    nodes as it is (Xiao, Boyd and Lall 2005).
    """
    degrees, weights = list(map(len, graph)), []
    for node, neighbours in enumerate(graph):
        row = {other: 1 / (1 + max(degrees[node], degrees[other])) for other in neighbours}
        weights.append(row | {node: max(0.0, 1 - sum(row.values()))})
    return weights


def _torus(num_nodes: int) -> Iterator[tuple[int, int]]:
    """A grid as square as it can be, whose sides are joined."""
    rows = max(n for n in range(1, isqrt(num_nodes) + 1) if num_nodes % n == 0)
    if rows == 1:
        raise ValueError(f"schedule.graph: {num_nodes} nodes fill no grid for a torus; use ring")
    grid = np.arange(num_nodes).reshape(rows, -1)
    for rolled in (np.roll(grid, -1, axis=0), np.roll(grid, -1, axis=1)):
        yield from zip(grid.flat, rolled.flat, strict=True)


def _erdos_renyi(num_nodes: int, probability: float, seed: int) -> Iterator[tuple[int, int]]:
    """Each pair is joined with the probability, independently of the others."""
    pairs = np.triu_indices(num_nodes, 1)
    joined = uniform(seed, "graph", *pairs) < probability
    return zip(*(side[joined] for side in pairs), strict=True)


def _read_edges(path: Path, num_nodes: int) -> Iterator[tuple[int, int]]:
    """Read a CSV file with a row for each edge: node,neighbour."""
    for place, row in read_table(path, ["node", "neighbour"]):
        ends = [row["node"].strip(), row["neighbour"].strip()]
        for text in ends:
            if not (text.isascii() and text.isdigit() and int(text) < num_nodes):
                raise ValueError(f"{place}: {text!r} is not a node, from 0 to {num_nodes - 1}")
        yield int(ends[0]), int(ends[1])


def _out_of_reach(graph: Graph) -> set[int]:
    """The nodes to which no path leads from node 0."""
    lost, reached = set(range(1, len(graph))), [0]
    while reached:
        found = lost.intersection(graph[reached.pop()])
        lost -= found
        reached += found
    return lost
