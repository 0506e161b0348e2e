"""What compiled loops share: how they are compiled and kept, random words, a sparse sum."""

import hashlib
from pathlib import Path

import numba
import numpy as np
from numba import njit
from numba.core import types
from numba.extending import intrinsic

HERE = Path(__file__).parent


def _cache_folder() -> Path:
    """A folder of its own for each state of the sources, below the user's NUMBA_CACHE_DIR if set.

    numba keeps machine code by the date of the file that a function stands in, and does not see
    when a function that it calls in another file has changed. So all files that compile anything
    count, and a new one counts without being named. Nor does numba see whether it was told to check
    every index (NUMBA_BOUNDSCHECK=1), so that code has a folder of its own too.
    """
    sources = [path.read_bytes() for path in sorted([*HERE.glob("*.py"), *HERE.glob("*/*.py")])]
    compiling = b"".join(source for source in sources if b"from compiled import" in source)
    state = hashlib.blake2b(Path(__file__).read_bytes() + compiling, digest_size=8).hexdigest()
    parent = numba.config.CACHE_DIR or HERE / "__pycache__"
    checked = "-checked" if numba.config.BOUNDSCHECK else ""
    return Path(parent) / f"numba-{state}{checked}"


numba.config.CACHE_DIR = str(_cache_folder())


def compiled(function, **options):
    """numba's machine code: compiled in a second at first use, then loaded where it can be kept.

    Without reference counting, which would cost ten times the coding: kernels allocate nothing.
    Python's other threads run meanwhile, so that clients can be encoded while others train.
    """
    options |= {"_nrt": False, "error_model": "numpy", "nogil": True}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither __pycache__ nor the user's cache folder can be written
        return njit(**options)(function)


def inlined(function):
    """Code with many callers: LLVM inlines it, so that `reading` and the state cost nothing."""
    return compiled(function, forceinline=True)


def part(function):
    """A part of one long routine: numba writes it into its caller and compiles it only there.

    With LLVM's inlining each part would also be compiled by itself, which takes twice the time.
    """
    return compiled(function, inline="always")


# numba counts a negative index from the end, and looks for one at each access unless told so.
index = np.uint64


@intrinsic
def num_ones(typing_context, word):
    """How many bits of a uint64 are set: one instruction, for which numba has no function."""
    return types.int64(types.uint64), lambda _, builder, __, words: builder.ctpop(words[0])


@compiled
def random_word(seed, k):
    """Output k (from 0) of SplitMix64 (Steele et al. 2014) with that seed; both uint64."""
    z = seed + (k + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled
def uniform(seed, k):
    """A number in [0, 1) of 53 random bits."""
    return np.float64(random_word(seed, np.uint64(k)) >> np.uint64(11)) * 2.0**-53


@compiled
def add_at(vector, indices, values, weight):
    """vector[indices] += weight * values; float32 [size], int64 [n], float32 [n].

    Raises IndexError, before anything is added, for an index that is not within 0 .. size - 1.
    """
    largest = index(0)  # a negative index is larger still: it becomes one of 2^63 or more
    for k in range(len(indices)):
        largest = max(largest, index(indices[k]))
    if len(values) != len(indices) or len(indices) > 0 and largest >= index(len(vector)):
        raise IndexError("an index lies outside of the vector, or has no value")
    for k in range(len(indices)):
        vector[index(indices[k])] += weight * values[k]
