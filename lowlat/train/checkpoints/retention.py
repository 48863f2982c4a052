"""Retention rule: which checkpoints stay. Touches no files."""

from collections.abc import Mapping
from datetime import timedelta


def steps_to_keep(times: Mapping[int, float], *, last: int, every: timedelta | None) -> set[int]:
    """The steps of the checkpoints that stay.

    times: when the checkpoint of each step was written, in seconds. The `last` newest by step stay.
    With `every`, the oldest stays for good, and then always the first one written at least `every`
    after the previous one that stays. Removing the others does not change the result.
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
