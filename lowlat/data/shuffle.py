"""Counter-based random numbers and permutations (SplitMix64), identical on every machine and in
every version.

numpy's generators may change between releases, but a run must resume after an upgrade.
"""

import numpy as np
from jaxtyping import Float64, Integer, UInt64

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def mixed(places: Integer[np.ndarray, " n"], *keys: int) -> UInt64[np.ndarray, " n"]:
    """64 random bits for each index in `places` of the stream with the seeds `keys` (SplitMix64,
    Steele et al., OOPSLA 2014).
    """
    state = 0
    for key in keys:
        state = int(finish(np.array([(state + GOLDEN * (key + 1)) & MASK], np.uint64))[0])
    # Unsigned arithmetic wraps, as the generator requires.
    steps = (places.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
    return finish(steps + np.uint64(state))


def uniform(places: Integer[np.ndarray, " n"], *keys: int) -> Float64[np.ndarray, " n"]:
    """A uniform number in [0, 1) for each index, of 53 random bits."""
    return (mixed(places, *keys) >> np.uint64(11)) * 2.0**-53


def permutation(count: int, *keys: int) -> Integer[np.ndarray, " count"]:
    """0 .. count - 1 in random order; 4 bytes each, 8 from 2^32 on."""
    order = np.argsort(mixed(np.arange(count), *keys), kind="stable")
    return order.astype(np.uint32 if count < 1 << 32 else np.int64)


def finish(state: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """SplitMix64's output function: spreads each state over 64 bits."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
