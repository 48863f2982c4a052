"""Numerical differences of two traces, layer by layer and part by part, summed over windows."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowlat.compare.trace import Block, Place, Trace

TOLERANCE = {
    "fp64": 1e-5,  # norms and rotary tables stay fp32
    "fp32": 1e-4,
    "fp16": 2e-2,
    "bf16": 1e-1,
    "fp8": 2e-1,
    "int8": 2e-1,
    "int4": 5e-1,
}
"""Largest relative difference due to rounding, by the coarser of the two data types."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Difference between B's and A's values of one part."""

    max_abs: float
    relative: float
    """Root mean square of the difference over that of A's values."""
    cosine: float


@dataclass(slots=True)
class DifferenceSums:
    """Running sums of a Difference over windows."""

    max_abs: float = 0.0
    error: float = 0.0
    a: float = 0.0
    b: float = 0.0
    product: float = 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add one window's values; a NaN in either makes the difference infinite."""
        x, y = a.double().flatten(), b.double().flatten()
        delta = x - y
        self.max_abs = max(self.max_abs, _finite(delta.abs().max()))
        self.error += _finite(delta.square().sum())
        self.a += _finite(x.square().sum())
        self.b += _finite(y.square().sum())
        self.product += float((x * y).sum())

    def difference(self) -> Difference:
        size = math.sqrt(self.a)
        relative = math.sqrt(self.error) / size if size else math.inf if self.error else 0.0
        both = math.sqrt(self.a) * math.sqrt(self.b)
        cosine = self.product / both if 0 < both < math.inf else 1.0 if self.a == self.b else 0.0
        if math.isnan(relative) or math.isnan(cosine):
            relative, cosine = math.inf, 0.0
        return Difference(max_abs=self.max_abs, relative=relative, cosine=min(cosine, 1.0))


@dataclass(slots=True)
class RoutingDifference:
    """Experts that differ between A and B."""

    changed: int = 0
    """Experts of A that B does not select."""
    chosen: int = 0
    """Experts of A."""
    tokens: int = 0
    """Tokens with a changed expert."""


@dataclass(slots=True)
class ChoiceDifference:
    """Tokens that sparse attention (DSA) of A attends to and that of B does not."""

    changed: int = 0
    chosen: int = 0
    """Tokens of A, of queries that choose: the others attend to all."""
    near_ties: bool = True
    """Whether all of them are near ties, at which B attends to the tokens of A."""


@dataclass(slots=True)
class LogitDifference:
    """Difference of two next-token distributions."""

    kl: float = 0.0
    """Sum of KL(A || B) in nats."""
    agreeing: int = 0
    """Tokens with the same top-1 prediction."""
    tokens: int = 0


@dataclass(slots=True)
class TraceDifferences:
    """All differences of two implementations."""

    sums: dict[Place, DifferenceSums] = field(default_factory=dict)
    routing: dict[Block, RoutingDifference] = field(default_factory=dict)
    choices: dict[Block, ChoiceDifference] = field(default_factory=dict)
    predictions: dict[Block, LogitDifference] = field(default_factory=dict)
    left_out: dict[str, set[str]] = field(default_factory=dict)
    """Reasons why a part was not compared, by part."""

    def add(self, a: Trace, b: Trace, *, near_ties: bool = False) -> None:
        """Add the differences of one window. near_ties: whether choices of tokens differ at near
        ties only; they count as equal.
        """
        for place in sorted(a.parts.keys() | b.parts.keys(), key=lambda place: place.order):
            x, y = a.parts.get(place), b.parts.get(place)
            reason = _reason(x, y)
            if reason is not None:
                self.left_out.setdefault(place.part, set()).add(reason)
                continue
            assert x is not None and y is not None
            if x.numel() == 0:  # a layer without RoPE channels
                continue
            if place.part == "index_choice":
                self._add_choice(place.block, x > 0, y > 0, near_ties)
                y = x if near_ties else y
            self.sums.setdefault(place, DifferenceSums()).add(x, y)
            if place.part == "logits":
                self._add_logits(place.block, x, y)
        other = b.selected_experts()
        for block, own in a.selected_experts().items():
            if block in other and own.shape == other[block].shape:
                self._add_routing(block, own, other[block])

    def places(self) -> list[Place]:
        """The compared parts, in order of computation."""
        return sorted(self.sums, key=lambda place: place.order)

    def difference(self, place: Place) -> Difference:
        return self.sums[place].difference()

    def first_beyond(self, tolerance: float) -> Place | None:
        """The first part with a larger relative difference; None if there is none."""
        return next((p for p in self.places() if self.difference(p).relative > tolerance), None)

    def _add_logits(self, block: Block, a: Tensor, b: Tensor) -> None:
        found = self.predictions.setdefault(block, LogitDifference())
        p, q = (x.double().log_softmax(dim=-1) for x in (a, b))
        found.kl += _finite((p.exp() * (p - q)).sum())
        found.agreeing += int((a.argmax(dim=-1) == b.argmax(dim=-1)).sum())
        found.tokens += len(a)

    def _add_choice(self, block: Block, a: Tensor, b: Tensor, near_ties: bool) -> None:
        found = self.choices.setdefault(block, ChoiceDifference())
        chooses = a.sum(dim=1) < torch.ones_like(a).tril().sum(dim=1)
        found.changed += int((a & ~b).sum())
        found.chosen += int(a[chooses].sum())
        found.near_ties &= near_ties or a.equal(b)

    def _add_routing(self, block: Block, a: Tensor, b: Tensor) -> None:
        found = self.routing.setdefault(block, RoutingDifference())
        kept = (a[:, :, None] == b[:, None, :]).any(dim=-1)
        found.changed += int((~kept).sum())
        found.chosen += kept.numel()
        found.tokens += int((~kept).any(dim=-1).sum())


def _reason(a: Tensor | None, b: Tensor | None) -> str | None:
    """Reason that a part cannot be compared; None if it can."""
    if a is None or b is None:
        return f"not seen in {'A' if a is None else 'B'}"
    if a.shape != b.shape:
        return f"of shape {list(a.shape)} in A and {list(b.shape)} in B"
    return None


def _finite(value: Tensor) -> float:
    number = float(value)
    return math.inf if math.isnan(number) else number
