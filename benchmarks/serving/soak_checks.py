"""Pass criteria of the soak test. The report repeats the bounds.

Growth is that of a least-squares line through the samples after the warm-up. A leak of a few bytes
per request shows there long before it shows in any two samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

WARM_SHARE = 0.25
"""Share of the time that is warm-up: buffers, pools and KV cache pages fill."""
MEMORY_GROWTH = 32 << 20
"""Allowed growth in bytes."""
DESCRIPTOR_GROWTH = 4.0
THREAD_GROWTH = 2.0
IDLE_DESCRIPTORS = 4
"""Allowed growth from before to after the load."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """State of the server at one moment; a row of the CSV."""

    seconds: float
    """Seconds since the load began."""
    rss_bytes: int
    descriptors: int
    threads: int
    processes: int
    health: int
    """HTTP status; 0 without a response."""
    running: float
    waiting: float
    cache_usage: float
    """Fraction of KV cache pages in use."""
    answered: int
    cancelled: int
    refused: int
    """Invalid requests that got 4xx."""
    busy: int
    """Requests answered with 429."""


def fitted_growth(points: Sequence[tuple[float, float]]) -> float:
    """Rise of the least-squares line through (time, value) from the first time to the last."""
    if len(points) < 2:
        return 0.0
    times, values = zip(*points, strict=True)
    mean_time, mean_value = sum(times) / len(times), sum(values) / len(values)
    spread = sum((time - mean_time) ** 2 for time in times)
    if spread == 0.0:
        return 0.0
    slope = sum((t - mean_time) * (v - mean_value) for t, v in points) / spread
    return slope * (times[-1] - times[0])


def growths(samples: Sequence[Sample]) -> dict[str, float]:
    """Growth of memory, descriptors and threads after the warm-up. Connections of active requests
    do not count as descriptors, because a slower server has more of them.
    """
    counted = [s for s in samples if s.seconds >= WARM_SHARE * samples[-1].seconds]
    series = {
        "rss_bytes": [float(s.rss_bytes) for s in counted],
        "descriptors": [s.descriptors - s.running - s.waiting for s in counted],
        "threads": [float(s.threads) for s in counted],
    }
    times = [s.seconds for s in counted]
    return {
        name: fitted_growth(list(zip(times, values, strict=True)))
        for name, values in series.items()
    }


def faults(samples: Sequence[Sample], before: Sample, after: Sample) -> list[str]:
    """Failed checks, one line each. `before` and `after`: samples of the idle server."""
    found = []
    growth = growths(samples)
    bounds = {
        "rss_bytes": MEMORY_GROWTH,
        "descriptors": DESCRIPTOR_GROWTH,
        "threads": THREAD_GROWTH,
    }
    for name, bound in bounds.items():
        if growth[name] > bound:
            found.append(f"{name} grew by {growth[name]:,.1f}, more than {bound:,.1f}")
    if after.descriptors > before.descriptors + IDLE_DESCRIPTORS:
        found.append(
            f"descriptors when idle: {before.descriptors} before, {after.descriptors} after"
        )
    if ill := [s for s in (*samples, after) if s.health != 200]:
        found.append(f"/health was {ill[0].health} after {ill[0].seconds:.0f} s ({len(ill)} times)")
    if after.running or after.waiting:
        found.append(f"idle, but {after.running:.0f} running and {after.waiting:.0f} waiting")
    if after.cache_usage:
        found.append(f"idle, but {after.cache_usage:.2%} of the KV cache is in use")
    return found
