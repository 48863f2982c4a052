"""Confidence intervals: Student's t for means, paired differences and pooled variance."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95

QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 1, 2, 3, ... degrees of freedom."""
NORMAL = 1.959964
"""The same of the normal distribution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate and its two-sided 95 % confidence interval."""

    mean: float
    half: float | None
    """Half the width of the interval; None for a single value."""
    count: int
    """Number of values."""


def confidence() -> str:
    """CONFIDENCE in text: '95 %'."""
    return f"{CONFIDENCE:.0%}".replace("%", " %")


def quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t to four digits; `freedom` is at least 1."""
    if freedom <= len(QUANTILES):
        return QUANTILES[freedom - 1]
    # Cornish-Fisher expansion of the normal quantile: exact to four digits here.
    cube, fifth = NORMAL**3, NORMAL**5
    first = (cube + NORMAL) / (4 * freedom)
    second = (5 * fifth + 16 * cube + 3 * NORMAL) / (96 * freedom**2)
    return NORMAL + first + second


def interval(values: Sequence[float]) -> Interval:
    """Mean of independent values with its Student t interval."""
    count = len(values)
    half = None
    if count > 1:
        half = quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean=statistics.fmean(values), half=half, count=count)


def paired(left: Mapping[int, float], right: Mapping[int, float]) -> Interval | None:
    """left - right over the common seeds; None if there are none."""
    differences = [left[seed] - right[seed] for seed in left if seed in right]
    return interval(differences) if differences else None


def pooled_half(values: Mapping[str, Mapping[int, float]]) -> float | None:
    """Half of the 95 % interval of the difference of any two variants, with one variance pooled
    over all: the residuals of variants x seeds after the mean of each variant and each seed
    (randomised blocks). Assumes equal variances.

    Variants with missing seeds are left out. None if fewer than two variants or two seeds remain.
    """
    seeds = sorted({seed for runs in values.values() for seed in runs})
    whole = [[runs[seed] for seed in seeds] for runs in values.values() if len(runs) == len(seeds)]
    if len(whole) < 2 or len(seeds) < 2:
        return None
    grand = statistics.fmean(x for row in whole for x in row)
    columns = [statistics.fmean(column) - grand for column in zip(*whole, strict=True)]
    squares = 0.0
    for row in whole:
        mean = statistics.fmean(row)
        squares += sum((x - mean - shift) ** 2 for x, shift in zip(row, columns, strict=True))
    freedom = (len(whole) - 1) * (len(seeds) - 1)
    return quantile(freedom) * math.sqrt(2 * squares / freedom / len(seeds))
