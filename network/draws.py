"""Draws by counters: each number is a function of a seed, a purpose and numbers such as a client's.

So a client's draw depends on no other client, and a hundred thousand of them are one call. The
function mixes 64-bit words with the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
"""

import hashlib

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: SplitMix64's increment


def uniform(seed: int, purpose: str, *keys: int | np.ndarray) -> np.ndarray:
    """Numbers above 0 and below 1, one for each element of the keys, which are broadcast."""
    word = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    state = np.array(int.from_bytes(word, "little"), np.uint64)
    with np.errstate(over="ignore"):  # words of 64 bits wrap around
        for key in keys:
            state = _mix(state ^ _mix(np.asarray(key).astype(np.uint64) + GOLDEN))
    return ((state >> np.uint64(12)) + 0.5) * 2.0**-52


def normal(seed: int, purpose: str, *keys: int | np.ndarray) -> np.ndarray:
    """Numbers from N(0, 1), by the transform of Box and Muller (1958)."""
    first, second = (uniform(seed, purpose, *keys, turn) for turn in (0, 1))
    return np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)


def _mix(word: np.ndarray) -> np.ndarray:
    """Spread each bit of the words over all of them, one to one."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
