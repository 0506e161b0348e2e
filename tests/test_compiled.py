"""compiled.py: the sparse sum stays within its vector, and index checks check what they should."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.runs import REPOSITORY

from compiled import add_at, compiled, num_ones

ONE = np.float32(1)


def test_add_at_adds():
    vector = np.arange(5, dtype=np.float32)
    add_at(vector, np.array([0, 4]), np.array([2, -2], np.float32), np.float32(0.5))
    assert vector.tolist() == [1, 1, 2, 3, 3]
    add_at(vector[:0], np.zeros(0, np.int64), np.zeros(0, np.float32), ONE)


@pytest.mark.parametrize("indices", [[5], [-1], [0, 1, 5], [2**62], [-(2**63), 0], [1, -5, 2]])
def test_add_at_refuses_an_index_outside_of_the_vector_before_it_adds_anything(indices):
    memory = np.zeros(15, np.float32)
    with pytest.raises(IndexError, match="outside of the vector"):
        add_at(memory[5:10], np.array(indices), np.ones(len(indices), np.float32), ONE)
    assert not memory.any()


def test_add_at_refuses_indices_without_values():
    vector = np.zeros(5, np.float32)
    with pytest.raises(IndexError, match="has no value"):
        add_at(vector, np.arange(5), np.ones(4, np.float32), ONE)


@pytest.mark.parametrize("word", [0, 1, 0x8000800080008000, 2**63, 2**64 - 1])
def test_num_ones_counts_bits(word):
    counted = compiled(lambda number: num_ones(number))(np.uint64(word))
    assert counted == word.bit_count()


BROKEN = """
import numpy as np
from compiled import compiled, index, inlined, part

@inlined
def inlined_look(array, k):
    return array[index(k)]

@part
def part_look(array, k):
    return array[index(k)]

@compiled
def look(array, k, way):
    if way == 0:
        return array[index(k)]
    if way == 1:
        return inlined_look(array, k)
    return part_look(array, k)

found = []
for way in range(3):
    for k in (-1, 0, 2):  # the first and the last one lie outside of the array below
        try:
            found.append(int(look(np.arange(4)[1:3], k, way)))
        except IndexError:
            found.append("refused")
print(*found)
"""


def test_numba_boundscheck_sees_every_index_and_never_runs_unchecked_code(tmp_path):
    """The three runs share a cache folder; the second finds machine code of the first there."""
    (tmp_path / "broken.py").write_text(BROKEN)
    outputs = []
    for checks in ("0", "1", "0"):
        environment = {"PYTHONPATH": str(REPOSITORY), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "broken.py"],
            cwd=tmp_path,
            env=os.environ | environment | {"NUMBA_BOUNDSCHECK": checks},
            capture_output=True,
            text=True,
        )
        outputs.append(done.stdout.split())
        assert done.returncode == 0, done.stderr
    assert outputs == [["0", "1", "3"] * 3, ["refused", "1", "refused"] * 3, ["0", "1", "3"] * 3]
