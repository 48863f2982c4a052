"""Which saves to keep. Owns the rule alone: no files."""

from collections.abc import Mapping
from datetime import timedelta


def kept(times: Mapping[int, float], *, last: int, every: timedelta | None) -> set[int]:
    """The steps to keep of those in `times`, which says when each was written (seconds).

    The `last` newest by step are kept, and for good the oldest and then always the first one
    written at least `every` after the one kept before it. What is kept does not change when the
    others are removed.
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
