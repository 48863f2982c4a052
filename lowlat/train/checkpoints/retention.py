"""Retention rule of checkpoints; touches no files."""

from collections.abc import Mapping
from datetime import timedelta


def steps_to_keep(times: Mapping[int, float], *, last: int, every: timedelta | None) -> set[int]:
    """Steps of the checkpoints to retain.

    times: write time of each step's checkpoint, in seconds. The `last` newest steps are retained.
    With `every`, the oldest is retained as well, then each first one written at least `every` after
    the previous retained one. Removing the others does not change the result.
    """
    steps = sorted(times)
    keep = set(steps[-last:])
    if every is None:
        return keep
    previous: float | None = None
    for step in steps:
        if previous is None or times[step] - previous >= every.total_seconds():
            keep.add(step)
            previous = times[step]
    return keep
