"""Result of a comparison as one JSON object; tables and plots are made from it.

Numbers that are not finite become null.
"""

from dataclasses import asdict
from typing import Any

from lowlat.compare.differences import Difference, TraceDifferences
from lowlat.compare.implementations.base import Implementation
from lowlat.compare.run import ComparisonResult
from lowlat.compare.trace import Place
from lowlat.compare.weights.run import WeightDifferences
from lowlat.utils.strict_json import finite

FORMAT = 1


def as_dict(result: ComparisonResult) -> dict[str, Any]:
    """The object of --json."""
    return {
        "format": FORMAT,
        "a": _implementation(result.a),
        "b": _implementation(result.b),
        "tokens": sum(len(window.ids) for window in result.windows),
        "windows": len(result.windows),
        "start": result.windows[0].start,
        "tolerance": result.tolerance,
        "experts_imposed": result.imposed,
        "equal": result.equal,
        **_measured(result.comparison, result.tolerance),
        "with_experts_imposed": None
        if result.with_imposed is None
        else _measured(result.with_imposed, result.tolerance),
        "left_out": {part: sorted(why) for part, why in result.comparison.left_out.items()},
        "diagnosis": _diagnosis(result),
        "config_differences": list(result.config_differences),
        "weights": None if result.weights is None else _weights(result.weights),
    }


def _implementation(implementation: Implementation) -> dict[str, Any]:
    return {
        "name": implementation.label,
        "precision": implementation.precision,
        "cache": implementation.cache_precision,
        "unseen": implementation.unseen,
    }


def _measured(comparison: TraceDifferences, tolerance: float) -> dict[str, Any]:
    first = comparison.first_beyond(tolerance)
    return {
        "first_difference": None if first is None else _part(first, comparison.difference(first)),
        "parts": [_part(place, comparison.difference(place)) for place in comparison.places()],
        "experts": [
            {"block": str(block), **asdict(found)} for block, found in comparison.routing.items()
        ],
        "chosen_tokens": [
            {"block": str(block), **asdict(found)} for block, found in comparison.choices.items()
        ],
        "logits": [
            {
                "block": str(block),
                "kl": finite(found.kl / found.tokens),
                "top1_agreement": found.agreeing / found.tokens,
            }
            for block, found in comparison.predictions.items()
        ],
    }


def _part(place: Place, found: Difference) -> dict[str, Any]:
    return {
        "place": str(place),
        "block": str(place.block),
        "stage": place.block.stage,
        "number": place.block.number,
        "part": place.part,
        **{name: finite(value) for name, value in asdict(found).items()},
    }


def _diagnosis(result: ComparisonResult) -> dict[str, Any]:
    diagnosis = result.diagnosis
    return {
        "mistakes": [
            {
                "implementation": found.label,
                "kind": found.kind,
                "name": found.name,
                "detail": found.detail,
                "judged_by_config_of": found.judged_by,
                "places": [str(place) for place in found.places],
            }
            for found in diagnosis.findings
        ],
        "audited": list(diagnosis.audited),
        "unexplained": [
            {"implementation": label, "place": str(place)} for label, place in diagnosis.unexplained
        ],
    }


def _weights(found: WeightDifferences) -> dict[str, Any]:
    return {
        "compared": found.compared,
        "equal": found.equal,
        "findings": [
            {
                "implementation": finding.explanation.label,
                "kind": finding.explanation.kind,
                "name": finding.name,
                "detail": finding.explanation.detail,
                "relative": finite(finding.relative),
                "places": [place.name for place in finding.places],
            }
            for finding in found.findings
        ],
        "not_compared": {"a": list(found.only[0]), "b": list(found.only[1])},
    }
