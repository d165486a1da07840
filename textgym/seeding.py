"""Counter-based random numbers: every draw is a pure function of (seed, counters).

The random numbers of an environment row, a guide request and a sampled token must not depend on the rest of the batch.
A hash of counters provides that without one generator object per row, in one array operation.
The hash is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

from typing import Any

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash64(*keys: Any) -> np.ndarray:
    """Hash integer keys to 64 bits, elementwise with broadcasting.

    Args:
        *keys: Integers or integer arrays that broadcast against each other; the order of the keys matters.

    Returns:
        uint64 array of the broadcast shape.
    """
    state: np.ndarray = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            if isinstance(key, int):
                key = np.uint64(key & 0xFFFFFFFFFFFFFFFF)
            state = (state ^ np.asarray(key).astype(np.uint64)) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(*keys: Any) -> np.ndarray:
    """Uniform draws in [0, 1) for integer keys (see `hash64`).

    Returns:
        float64 array of the broadcast shape, multiples of 2**-53.
    """
    return (hash64(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integer(low: Any, high: Any, draws: np.ndarray) -> np.ndarray:
    """Map uniform draws to integers, uniform on {low..high}, both ends included.

    Args:
        low: Integer or int array.
        high: Integer or int array, at least `low`.
        draws: Uniform draws in [0, 1) (see `uniform`).

    Returns:
        int64 array of the broadcast shape.
    """
    low, high = np.asarray(low, np.int64), np.asarray(high, np.int64)
    return low + (draws * (high - low + 1)).astype(np.int64)
