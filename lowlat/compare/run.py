"""One comparison: both sides over the same windows, measured and explained."""

from collections.abc import Sequence
from dataclasses import dataclass

from lowlat.compare.blame import Verdict, blame, disagreements
from lowlat.compare.measure import TOLERANCE, Comparison
from lowlat.compare.side import Side
from lowlat.compare.trace import Place, Window
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, SilentProgress

SAME = ("vocab_size", "hidden_size", "num_hidden_layers")
"""Fields without which nothing can be compared."""
ORDER = tuple(TOLERANCE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a comparison found."""

    a: Side
    b: Side
    windows: tuple[Window, ...]
    tolerance: float
    comparison: Comparison
    verdict: Verdict
    fixed: Comparison | None
    """The same with A's choice of experts imposed on B; None where both chose alike or where B
    takes none."""
    imposed: bool
    """`comparison` itself was made with A's choices imposed on B."""
    disagreements: tuple[str, ...]
    """Fields in which the configs differ."""

    @property
    def first(self) -> Place | None:
        """The first part that differs by more than the tolerance."""
        return self.comparison.first_beyond(self.tolerance)

    @property
    def equal(self) -> bool:
        return self.first is None


def tolerance_of(a: Side, b: Side) -> float:
    """The tolerance of the coarsest number type of weights and caches."""
    own = (a.precision, b.precision, a.cache_precision, b.cache_precision)
    return TOLERANCE[max(filter(None, own), key=ORDER.index)]


def check_pair(a: Side, b: Side) -> None:
    """Raises UserError naming the field in which two models are no two forms of one."""
    for name in SAME:
        x, y = getattr(a.config, name), getattr(b.config, name)
        if x != y:
            raise UserError(
                f"{a.label} and {b.label} cannot be compared: {name} is {x} and {y}; "
                "give two forms of one model"
            )


def check_experts(a: Side, b: Side) -> None:
    """Raises UserError where the experts of `a` cannot be imposed on `b`."""
    if a.config.moe is None or b.config.moe is None:
        label = a.label if a.config.moe is None else b.label
        raise UserError(f"--fix-experts: {label} has no experts; leave it out")
    if not a.takes_choices:
        raise UserError(
            f"--fix-experts: {a.label} does not show which experts it takes; give another form of "
            "the model as A"
        )
    if not b.takes_choices:
        raise UserError(f"--fix-experts: experts cannot be imposed on {b.label}; exchange A and B")


def compare(
    a: Side,
    b: Side,
    windows: Sequence[Window],
    *,
    tolerance: float | None = None,
    fix_experts: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Run `windows` through both sides, one after the other, and compare every part.

    Each window is read from an empty context. With `fix_experts` B uses the experts that A chose.
    Memory: the traces of one window. Raises UserError where the models do not fit each other.
    """
    check_pair(a, b)
    if fix_experts:
        check_experts(a, b)
    own, fixed = Comparison(), Comparison()
    verdict: Verdict | None = None
    total = sum(len(window.ids) for window in windows)
    with (progress or SilentProgress()).task("comparing", total, "tokens") as task:
        for window in windows:
            mine = a.trace(window)
            choices = mine.choices()
            theirs = b.trace(window, choices if fix_experts else None)
            own.add(mine, theirs)
            if verdict is None or not verdict.findings:
                verdict = blame(mine, theirs, a.config, b.config, window)
            if not fix_experts and b.takes_choices and _diverge(choices, theirs.choices()):
                theirs = b.trace(window, choices)
            fixed.add(mine, theirs)
            task.advance(len(window.ids))
    assert verdict is not None, "no windows"
    changed = any(choice.changed for choice in own.choices.values())
    return Report(
        a=a,
        b=b,
        windows=tuple(windows),
        tolerance=tolerance_of(a, b) if tolerance is None else tolerance,
        comparison=own,
        verdict=verdict,
        fixed=fixed if changed and b.takes_choices and not fix_experts else None,
        imposed=fix_experts,
        disagreements=tuple(disagreements(a.config, b.config)),
    )


def _diverge(a: dict, b: dict) -> bool:
    """Whether two sides chose other experts anywhere (their order within a token is free)."""
    return any(
        block in b and bool((x.sort(dim=-1).values != b[block].sort(dim=-1).values).any())
        for block, x in a.items()
    )
