"""Compare the weights of two checkpoints tensor by tensor, and explain what differs.

Cheap tests come first: equal bytes, then rounding, scale and offset from sums over rows, then
reordered rows within the tensor, then other tensors of A. Memory holds a few copies of one tensor.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lowlat.checkpoint.mapping import ROUTER_BIAS
from lowlat.compare.weights.checkpoint import CheckpointWeights
from lowlat.compare.weights.elsewhere import WeightIndex, explain_moves
from lowlat.compare.weights.finding import Explanation, Place, WeightFinding
from lowlat.compare.weights.layout import HeadLayout, head_layout
from lowlat.compare.weights.rounding import (
    EXACT,
    block_rounding,
    exact_rounding,
    limit_of,
    stored_rounding,
)
from lowlat.compare.weights.scan import WeightScan, scan
from lowlat.compare.weights.structure import (
    Structure,
    explain_heads,
    explain_scales,
    explain_vector,
    is_transposed,
)
from lowlat.utils.progress import Progress, SilentProgress

ATTENTION = re.compile(r"model\.layers\.(\d+)\.self_attn\.")
LARGEST = 2**27
"""Elements of the largest weight whose rows are reordered; embeddings may be larger."""
NAMED_SCALE = 0.02
"""Smallest relative difference that is tried as a scale or an offset."""

LEFT = 0.5
"""Largest share of a difference that a scale or an offset may leave."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightDifferences:
    """Differences of two checkpoints."""

    compared: int
    """Weights that both have in one shape."""
    equal: int
    findings: tuple[WeightFinding, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    """Weights that only A has, and that only B has, or has in another shape."""

    @property
    def differ(self) -> bool:
        return self.equal < self.compared


def compare_weights(
    path_a: Path, path_b: Path, progress: Progress | None = None
) -> WeightDifferences | None:
    """Compare the checkpoints at two paths; None if they are one.

    Raises UserError naming file and tensor for a checkpoint that cannot be read.
    """
    if path_a.resolve() == path_b.resolve():
        return None
    a, b = CheckpointWeights(path_a), CheckpointWeights(path_b)
    return _Comparison(a, b).run(progress or SilentProgress())


class _Comparison:
    """One comparison: explanations as they are found."""

    def __init__(self, a: CheckpointWeights, b: CheckpointWeights) -> None:
        self.a, self.b = a, b
        self._found: dict[Explanation, list[Place]] = defaultdict(list)
        self._unexplained: dict[str, tuple[WeightScan, str]] = {}
        """Weights without an explanation so far, and where in them the difference is."""
        self._relative: dict[str, float] = {}

    def run(self, progress: Progress) -> WeightDifferences:
        a, b = self.a.shapes, self.b.shapes
        common = [name for name in a if b.get(name) == a[name] and self._is_comparable(name)]
        equal = 0
        with progress.task("comparing weights", len(common)) as task:
            for name in common:
                found = scan(self.a, self.b, name)
                equal += found.equal
                if not found.equal:
                    self._relative[name] = found.relative
                    self._explain(name, found)
                self.a.release(name)
                self.b.release(name)
                task.advance(1)
        self._search()
        findings = [
            WeightFinding(explanation=each, places=tuple(places))
            for each, places in self._found.items()
        ]
        findings.sort(key=lambda finding: finding.explanation.kind == "rounding")
        known = set(common)
        only = tuple(n for n in a if n not in known), tuple(n for n in b if n not in known)
        return WeightDifferences(
            compared=len(common), equal=equal, findings=tuple(findings), only=only
        )

    def _is_comparable(self, name: str) -> bool:
        """False in attention of another kind, whose channels have another basis."""
        found = ATTENTION.match(name)
        if found is None:
            return True
        kinds = [type(each.config.attention_of(int(found[1]))) for each in (self.a, self.b)]
        return kinds[0] is kinds[1]

    def _add(self, name: str, *explanations: Explanation) -> None:
        for explanation in explanations:
            self._found[explanation].append(Place(name, self._relative[name]))

    def _explain(self, name: str, found: WeightScan) -> None:
        """Explain the weight `name` by itself, or note that it is not explained."""
        types = self.a.stored_type(name), self.b.stored_type(name)
        limit = max(map(limit_of, types))
        layout = head_layout(self.a.config, name, self.a.shapes[name])
        explanation = exact_rounding(found)
        if explanation is None and (layout is None or not layout.axis):
            # The heads of columns are not seen in the rows.
            explanation = stored_rounding(found, *types)
        explanation = explanation or _scale(found, limit)
        if explanation is not None:
            self._add(name, explanation)
            return
        if found.count > LARGEST:
            self._unexplained[name] = found, ""
            return
        explanations, where = self._in_full(name, found, limit)
        if not explanations and not where:
            explanation = stored_rounding(found, *types)
            explanations = [explanation] if explanation else []
        self._add(name, *explanations)
        if where or not explanations:
            self._unexplained[name] = found, where

    def _in_full(
        self, name: str, scanned: WeightScan, limit: float
    ) -> tuple[list[Explanation], str]:
        """Explanations that need all values, and the heads that have none."""
        x, y = self.a.read(name), self.b.read(name)
        if limit == EXACT and (rounded := block_rounding(x, y, scanned.relative)):
            return [rounded], ""
        layout = head_layout(self.a.config, name, self.a.shapes[name])
        if x.dim() == 1 and layout is None:
            return explain_vector(x, y, "expert" if name.endswith(ROUTER_BIAS) else "channel"), ""
        if x.dim() == 2 and is_transposed(x, y, limit):
            return [Explanation("transposed", "is transposed")], ""
        found = Structure() if layout is None else self._by_head(name, x, y, layout, limit)
        if x.dim() == 2 and (found.unexplained or not found.explanations):
            scales = explain_scales(x, y, min(limit, scanned.relative * LEFT))
            found = Structure(explanations=scales) if scales else found
        return found.explanations, found.unexplained

    def _by_head(
        self, name: str, x: Tensor, y: Tensor, layout: HeadLayout, limit: float
    ) -> Structure:
        layer = int(name.split(".")[2])
        own, other = (each.config.rope_of(layer).rope_interleave for each in (self.a, self.b))
        found = explain_heads(x, y, layout, limit, interleave=own)
        if own != other:
            found.explanations = [_as_configured(each) for each in found.explanations]
        return found

    def _search(self) -> None:
        """Search the unexplained weights among the other tensors of A."""
        index, sources = WeightIndex(self.a), {}
        for name in self._unexplained:
            limit = max(limit_of(self.a.stored_type(name)), limit_of(self.b.stored_type(name)))
            source = index.find(self.b, name, limit)
            if source is not None:
                sources[name] = source
        for move in explain_moves(sources):
            largest = max(self._relative[name] for name in move.names)
            self._found[move.explanation].append(Place(move.place, largest))
        for name, (found, where) in self._unexplained.items():
            if name not in sources:
                self._add(name, Explanation("unexplained", f"differs in {where or _rows(found)}"))


def _scale(found: WeightScan, limit: float) -> Explanation | None:
    """A constant factor or summand."""
    if found.relative < NAMED_SCALE or found.count < 2:
        return None
    if found.b == 0:
        return Explanation("constant", "has zeros")
    # Of a rounded weight the residual stays as large as the difference.
    limit = min(limit, found.relative * LEFT)
    if found.scale_residual <= limit:
        return Explanation("scale", f"scales the weight by {found.scale:.4g}")
    if found.offset_residual <= limit:
        return Explanation("offset", f"adds {found.offset:.4g} to the weight")
    return None


def _as_configured(found: Explanation) -> Explanation:
    """The explanation of weights whose configs differ in rope_interleave."""
    if found.kind != "rope_rows":
        return found
    return found._replace(detail=f"{found.detail}; its config differs in rope_interleave, too")


def _rows(found: WeightScan) -> str:
    if found.changed_rows == found.rows:
        return "all rows"
    return f"{found.changed_rows:,} of {found.rows:,} rows, first in row {found.first_changed}"
