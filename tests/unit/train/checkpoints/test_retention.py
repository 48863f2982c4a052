"""Which saves are kept."""

from datetime import timedelta

import pytest

from lowlat.train.checkpoints.store import steps_to_keep

HOUR = 3600.0


def test_the_newest_are_kept() -> None:
    times = {step: float(step) for step in (5, 3, 11, 7)}
    assert steps_to_keep(times, last=2, every=None) == {7, 11}
    assert steps_to_keep(times, last=9, every=None) == {3, 5, 7, 11}
    assert steps_to_keep({}, last=2, every=timedelta(hours=1)) == set()


def test_one_of_each_time_is_kept() -> None:
    """Checkpoints every 20 minutes, one kept of every hour, the first among them."""
    times = {step: step * HOUR / 3 for step in range(11)}
    assert steps_to_keep(times, last=2, every=timedelta(hours=1)) == {0, 3, 6, 9, 10}


@pytest.mark.parametrize("every", [None, timedelta(hours=2)])
def test_what_is_kept_does_not_depend_on_what_was_removed(every: timedelta | None) -> None:
    """Regression: a rule that counts in saves that are gone and lets the kept ones go, too."""
    times: dict[int, float] = {}
    everything: dict[int, float] = {}
    for step in range(1, 40):
        times[step] = everything[step] = step * HOUR * 0.7
        keep = steps_to_keep(times, last=3, every=every)
        assert keep == steps_to_keep(everything, last=3, every=every)
        times = {step: times[step] for step in keep}
    assert len(times) == (3 if every is None else 15)


def test_a_clock_that_was_set_back_loses_nothing() -> None:
    """Checkpoints with times before those kept count as recent; nothing fails."""
    times = {1: 10 * HOUR, 2: 1 * HOUR, 3: 2 * HOUR, 4: 10.5 * HOUR, 5: 11 * HOUR, 6: 11.1 * HOUR}
    assert steps_to_keep(times, last=2, every=timedelta(hours=1)) == {1, 5, 6}
