"""What runs with equal seeds say about two arms: the difference of their losses and how sure it is.

Owns the comparison and its wording; nothing here says more than the confidence does.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lowlat_lab.study.measure import standard_error
from lowlat_lab.study.run import Ran
from lowlat_lab.study.statistics import CONFIDENCE, Interval, paired, pooled_half

Verdict = Literal["lower", "higher", "undecided"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """`left` beside `right`: left's held-out loss minus right's."""

    left: str
    right: str
    """Names of arms."""
    difference: Interval
    """Over the seeds both have, with Student's interval of these differences alone."""
    pooled_half: float | None
    """Half the interval with one spread estimated from all arms."""
    text_error: float | None
    """Standard error of the difference over the windows of the held-out text."""

    @property
    def verdict(self) -> Verdict:
        """By the interval of the pair's own differences."""
        return _verdict(self.difference.mean, self.difference.half)

    @property
    def pooled_verdict(self) -> Verdict:
        """By the interval whose spread is that of all arms."""
        return _verdict(self.difference.mean, self.pooled_half)

    def as_json(self) -> dict[str, Any]:
        """All of it as the report holds it."""
        return asdict(self) | {"verdict": self.verdict, "pooled_verdict": self.pooled_verdict}


def compare(
    ran: Sequence[Ran], pairs: Sequence[tuple[str, str]], pooled: Sequence[str]
) -> list[Comparison]:
    """The comparisons of `pairs`, without those of which a side has no run. The pooled spread is
    that of the arms `pooled`.
    """
    losses = by_arm(ran, "loss")
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


def by_arm(ran: Sequence[Ran], key: str) -> dict[str, dict[int, float]]:
    """A figure of all finished runs: arm -> seed -> value."""
    found: dict[str, dict[int, float]] = {}
    for run in ran:
        if run.result is not None:
            found.setdefault(run.arm, {})[run.seed] = run.result[key]
    return found


def sentence(comparison: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """A comparison of a report in a sentence, without a full stop."""
    left, right = labels[comparison["left"]], labels[comparison["right"]]
    mean, half = comparison["difference"]["mean"], comparison["difference"]["half"]
    if half is None:
        return f"{left} - {right} = {mean:+.4f} with one seed, which has no confidence"
    figures = f"{mean:+.4f} ± {half:.4f}"
    if comparison["verdict"] != "undecided":
        return f"{left} has a {comparison['verdict']} loss than {right} ({figures})"
    if comparison["pooled_verdict"] == "undecided":
        return f"{left} and {right} are within noise of one another ({figures})"
    return (
        f"{left} and {right} are within noise by their own seeds ({figures}); with the spread of "
        f"all arms {left} is {comparison['pooled_verdict']} (± {comparison['pooled_half']:.4f})"
    )


def confidence() -> str:
    """'95 %'."""
    return f"{CONFIDENCE:.0%}".replace("%", " %")


def _verdict(mean: float, half: float | None) -> Verdict:
    if half is None or abs(mean) <= half:
        return "undecided"
    return "lower" if mean < 0 else "higher"


def _text_error(ran: Sequence[Ran], left: str, right: str) -> float | None:
    """Over windows, of the difference averaged over the seeds both have."""
    windows: dict[tuple[str, int], list[float]] = {
        (run.arm, run.seed): run.result["window_losses"] for run in ran if run.result is not None
    }
    seeds = [seed for arm, seed in windows if arm == left and (right, seed) in windows]
    pairs = [(windows[left, seed], windows[right, seed]) for seed in seeds]
    differences = [
        statistics.fmean(one[place] - other[place] for one, other in pairs)
        for place in range(len(pairs[0][0]))
    ]
    return standard_error(differences)
