"""Run a comparison: both implementations over the same windows, measured and diagnosed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowlat.compare.diagnosis.diagnose import Diagnosis, config_differences, diagnose
from lowlat.compare.diagnosis.near_ties import follows_scores, near_ties
from lowlat.compare.differences import TOLERANCE, TraceDifferences
from lowlat.compare.implementations.base import Implementation
from lowlat.compare.trace import NONE_IMPOSED, ImposedChoices, Place, RoutedExperts, Trace, Window
from lowlat.compare.weights.run import WeightDifferences
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, SilentProgress

SAME = ("vocab_size", "hidden_size", "num_hidden_layers")
"""Config fields that must be equal for a comparison."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonResult:
    """The differences, their diagnosis, and what was compared."""

    a: Implementation
    b: Implementation
    windows: tuple[Window, ...]
    tolerance: float
    comparison: TraceDifferences
    diagnosis: Diagnosis
    with_imposed: TraceDifferences | None
    """The differences with A's experts imposed on B; None if both select the same experts, or if B
    cannot run with imposed ones.
    """
    imposed: bool
    """Whether `comparison` itself has A's experts imposed on B."""
    config_differences: tuple[str, ...]
    weights: WeightDifferences | None
    """Differences of the checkpoints; None if A and B have one, or were not compared."""

    @property
    def first(self) -> Place | None:
        """The first part that differs by more than the tolerance."""
        return self.comparison.first_beyond(self.tolerance)

    @property
    def equal(self) -> bool:
        return self.first is None


def tolerance_of(a: Implementation, b: Implementation) -> float:
    """The tolerance of the coarsest data type of weights and KV caches."""
    precisions = (a.precision, b.precision, a.cache_precision, b.cache_precision)
    return TOLERANCE[max(filter(None, precisions), key=tuple(TOLERANCE).index)]


def check_pair(a: Implementation, b: Implementation) -> None:
    """Raises UserError, naming a config field, if the implementations run different models."""
    for name in SAME:
        x, y = getattr(a.config, name), getattr(b.config, name)
        if x != y:
            raise UserError(
                f"{a.label} and {b.label} cannot be compared: {name} is {x} and {y}; "
                "give two implementations of one model"
            )


def check_experts(a: Implementation, b: Implementation) -> None:
    """Raises UserError if the experts of `a` cannot be imposed on `b`."""
    if a.config.moe is None or b.config.moe is None:
        label = a.label if a.config.moe is None else b.label
        raise UserError(f"--impose-experts: {label} has no experts; leave it out")
    if not a.can_impose_experts:
        raise UserError(
            f"--impose-experts: {a.label} does not show the experts it selects; give another A"
        )
    if not b.can_impose_experts:
        raise UserError(f"--impose-experts: {b.label} selects its own experts; exchange A and B")


def compare(
    a: Implementation,
    b: Implementation,
    windows: Sequence[Window],
    *,
    tolerance: float | None = None,
    impose_experts: bool = False,
    weights: WeightDifferences | None = None,
    progress: Progress | None = None,
) -> ComparisonResult:
    """Run `windows` through both implementations and compare every part.

    Each window starts with an empty context. With `impose_experts` B uses A's selected experts.
    Where the tokens that sparse attention (DSA) chooses differ at near ties only, and no mistake is
    found, B attends to the tokens of A.
    `weights` becomes part of the result. Memory holds the traces of one window. Raises UserError
    for two different models.
    """
    check_pair(a, b)
    if impose_experts:
        check_experts(a, b)
    limit = tolerance_of(a, b) if tolerance is None else tolerance
    own, with_imposed = TraceDifferences(), TraceDifferences()
    diagnosis: Diagnosis | None = None
    total = sum(len(window.ids) for window in windows)
    with (progress or SilentProgress()).task("comparing", total, "tokens") as task:
        for window in windows:
            trace_a = a.trace(window)
            experts = trace_a.selected_experts()
            imposed = ImposedChoices(experts=experts) if impose_experts else NONE_IMPOSED
            trace_b = b.trace(window, imposed)
            if diagnosis is None or not diagnosis.findings:
                diagnosis = diagnose(trace_a, trace_b, a.config, b.config, window)
            can_tie = b.can_impose_tokens and not diagnosis.findings
            if can_tie and _choose_differently(trace_a, trace_b):
                with_tokens = replace(imposed, tokens=trace_a.chosen_tokens())
                tied = _near_ties(trace_a, a, b, window, with_tokens, limit)
                if tied is not None:
                    trace_b, imposed = tied, with_tokens
            own.add(trace_a, trace_b, near_ties=bool(imposed.tokens))
            can_repeat = b.can_impose_experts and not impose_experts
            if can_repeat and _route_differently(experts, trace_b.selected_experts()):
                trace_b = b.trace(window, replace(imposed, experts=experts))
            with_imposed.add(trace_a, trace_b, near_ties=bool(imposed.tokens))
            task.advance(len(window.ids))
    assert diagnosis is not None, "no windows"
    changed = any(difference.changed for difference in own.routing.values())
    has_repeated = changed and b.can_impose_experts and not impose_experts
    return ComparisonResult(
        a=a,
        b=b,
        windows=tuple(windows),
        tolerance=limit,
        comparison=own,
        diagnosis=diagnosis,
        with_imposed=with_imposed if has_repeated else None,
        imposed=impose_experts,
        config_differences=tuple(config_differences(a.config, b.config)),
        weights=weights,
    )


def _choose_differently(a: Trace, b: Trace) -> bool:
    """Whether sparse attention (DSA) attends to other tokens in any block."""
    own, other = a.chosen_tokens(), b.chosen_tokens()
    return any(block in other and not other[block].equal(own[block]) for block in own)


def _near_ties(
    trace_a: Trace,
    a: Implementation,
    b: Implementation,
    window: Window,
    imposed: ImposedChoices,
    tolerance: float,
) -> Trace | None:
    """B over the tokens that A chose, which `imposed` has, if its own choice then differs at near
    ties only: an earlier difference would change the scores of later layers.
    """
    if not follows_scores(trace_a, a.config, window):
        return None
    found = b.trace(window, imposed)
    return found if near_ties(trace_a, found, a.config, window, tolerance) else None


def _route_differently(a: RoutedExperts, b: RoutedExperts) -> bool:
    """Whether any token has different experts; their order within a token does not count."""
    return any(
        block in b and bool((x.sort(dim=-1).values != b[block].sort(dim=-1).values).any())
        for block, x in a.items()
    )
