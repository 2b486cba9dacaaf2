"""Arrays of 64-bit integers, and the one mixing of their bits that hashes and random numbers share."""

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
UInt64s = NDArray[np.uint64]


def mixed(values: UInt64s) -> UInt64s:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64-bit integers that avalanches. Any shape."""
    x = np.asarray(values, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
