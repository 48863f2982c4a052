"""Paired comparison of two variants: difference of held-out losses over common seeds, with a
confidence interval.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lowlat_lab.study.measure import standard_error
from lowlat_lab.study.resumable import RunResult
from lowlat_lab.study.statistics import Interval, paired, pooled_half

Verdict = Literal["lower", "higher", "undecided"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Left's held-out loss minus right's."""

    left: str
    right: str
    """Names of variants."""
    difference: Interval
    """Mean over the common seeds, with its Student t interval."""
    pooled_half: float | None
    """Half of the interval with a variance pooled over all variants."""
    text_error: float | None
    """Standard error of the difference over the windows of the held-out text."""

    @property
    def verdict(self) -> Verdict:
        """Verdict by the interval of this pair's differences."""
        return _verdict(self.difference.mean, self.difference.half)

    @property
    def pooled_verdict(self) -> Verdict:
        """Verdict by the interval with the pooled variance."""
        return _verdict(self.difference.mean, self.pooled_half)

    def as_json(self) -> dict[str, Any]:
        """The comparison in a report."""
        return asdict(self) | {"verdict": self.verdict, "pooled_verdict": self.pooled_verdict}


def compare(
    ran: Sequence[RunResult], pairs: Sequence[tuple[str, str]], pooled: Sequence[str]
) -> list[Comparison]:
    """Compare `pairs` of variants, except those without runs. The pooled variance is that of the
    variants `pooled`.
    """
    losses = by_variant(ran, "loss")
    half = pooled_half({name: losses[name] for name in pooled if name in losses})
    found = []
    for left, right in pairs:
        difference = paired(losses.get(left, {}), losses.get(right, {}))
        if difference is not None:
            found.append(
                Comparison(
                    left=left,
                    right=right,
                    difference=difference,
                    pooled_half=half,
                    text_error=_text_error(ran, left, right),
                )
            )
    return found


def by_variant(ran: Sequence[RunResult], key: str) -> dict[str, dict[int, float]]:
    """One figure of all finished runs, by variant and seed."""
    found: dict[str, dict[int, float]] = {}
    for run in ran:
        if run.result is not None:
            found.setdefault(run.variant, {})[run.seed] = run.result[key]
    return found


def _verdict(mean: float, half: float | None) -> Verdict:
    if half is None or abs(mean) <= half:
        return "undecided"
    return "lower" if mean < 0 else "higher"


def _text_error(ran: Sequence[RunResult], left: str, right: str) -> float | None:
    """Standard error over windows of the difference, averaged over the common seeds."""
    windows: dict[tuple[str, int], list[float]] = {
        (run.variant, run.seed): run.result["window_losses"]
        for run in ran
        if run.result is not None
    }
    seeds = [seed for variant, seed in windows if variant == left and (right, seed) in windows]
    pairs = [(windows[left, seed], windows[right, seed]) for seed in seeds]
    differences = [
        statistics.fmean(one[place] - other[place] for one, other in pairs)
        for place in range(len(pairs[0][0]))
    ]
    return standard_error(differences)
