"""Random numbers by place: fixed forever, even, and different under every key."""

import numpy as np
import pytest

from lowlat.data.shuffle import mixed, permutation, uniform


def test_numbers_never_change() -> None:
    """Regression: a run that resumes after an upgrade with its data in another order."""
    assert mixed(np.arange(3), 7, 1).tolist() == [
        7084762027518950502,
        4767613519079100543,
        6294318053904221498,
    ]
    assert permutation(11, 7, 1).tolist() == [9, 1, 5, 4, 3, 2, 6, 0, 10, 8, 7]


def test_a_place_has_one_number() -> None:
    whole = mixed(np.arange(1009), 3)
    assert np.array_equal(mixed(np.array([1008, 13]), 3), whole[[1008, 13]])


@pytest.mark.parametrize("count", [0, 1, 2, 1013])
def test_permutation_is_one(count: int) -> None:
    order = permutation(count, 5, 0)
    assert sorted(order.tolist()) == list(range(count))
    assert order.dtype == np.uint32


def test_every_key_counts_and_so_does_its_place() -> None:
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (2**64 - 1,), (3, 101), (3, 102)]
    streams = {tuple(mixed(np.arange(4), *key).tolist()) for key in keys}
    assert len(streams) == len(keys)


def test_uniform_is_even_and_below_one() -> None:
    draws = uniform(np.arange(100_003), 11)
    counts = np.histogram(draws, 10, (0.0, 1.0))[0]
    assert draws.min() >= 0.0 and draws.max() < 1.0
    assert counts.sum() == len(draws) and np.ptp(counts) < 600
