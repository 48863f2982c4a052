"""Intervals against textbook values and against one another."""

import math

import pytest
from lowlat_lab.study.statistics import interval, paired, pooled_half, quantile


def test_quantiles_beyond_the_table_join_it() -> None:
    assert quantile(2) == 4.303
    assert quantile(31) == pytest.approx(2.0395, abs=1e-4)
    assert quantile(60) == pytest.approx(2.0003, abs=1e-4)
    assert quantile(10**6) == pytest.approx(1.96, abs=1e-4)


def test_interval_of_a_mean() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(4.303 / math.sqrt(3))


def test_one_value_has_no_confidence() -> None:
    found = interval([5.0])
    assert found.half is None


def test_pairs_cancel_what_seeds_share() -> None:
    """Regression: differences of means, whose spread is that of the seeds."""
    left, right = {1: 3.1, 2: 5.1, 3: 4.1}, {1: 3.0, 2: 5.0, 3: 4.0}
    found = paired(left, right)
    assert found is not None and found.mean == pytest.approx(0.1)
    assert found.half == pytest.approx(0.0, abs=1e-9)
    assert paired({1: 1.0}, {2: 1.0}) is None


def test_two_arms_pooled_are_a_pair() -> None:
    left, right = {1: 3.2, 2: 5.1, 3: 4.6}, {1: 3.0, 2: 5.3, 3: 4.0}
    found = paired(left, right)
    assert found is not None and found.half is not None
    assert pooled_half({"a": left, "b": right}) == pytest.approx(found.half, rel=1e-9)


def test_pooling_leaves_out_arms_with_missing_seeds() -> None:
    whole = {"a": {1: 3.2, 2: 5.1}, "b": {1: 3.0, 2: 5.3}}
    assert pooled_half(whole | {"c": {1: 9.0}}) == pooled_half(whole)
    assert pooled_half({"a": {1: 1.0, 2: 2.0}}) is None
