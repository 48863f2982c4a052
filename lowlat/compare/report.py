"""A report as one JSON object, from which tables and pictures are made.

Numbers that are not finite become null, which JSON can say.
"""

from typing import Any

from lowlat.compare.measure import Comparison, Difference
from lowlat.compare.run import Report
from lowlat.compare.side import Side
from lowlat.compare.trace import Place
from lowlat.utils.strict_json import finite

FORMAT = 1


def as_dict(report: Report) -> dict[str, Any]:
    """What --json prints."""
    return {
        "format": FORMAT,
        "a": _side(report.a),
        "b": _side(report.b),
        "tokens": sum(len(window.ids) for window in report.windows),
        "windows": len(report.windows),
        "start": report.windows[0].start,
        "tolerance": report.tolerance,
        "experts_imposed": report.imposed,
        "equal": report.equal,
        **_measured(report.comparison, report.tolerance),
        "with_experts_imposed": None
        if report.fixed is None
        else _measured(report.fixed, report.tolerance),
        "left_out": {part: sorted(why) for part, why in report.comparison.left_out.items()},
        "verdict": _verdict(report),
        "config_differences": list(report.disagreements),
    }


def _side(side: Side) -> dict[str, Any]:
    return {
        "name": side.label,
        "precision": side.precision,
        "cache": side.cache_precision,
        "unseen": side.unseen,
    }


def _measured(comparison: Comparison, tolerance: float) -> dict[str, Any]:
    first = comparison.first_beyond(tolerance)
    return {
        "first_difference": None if first is None else _part(first, comparison.difference(first)),
        "parts": [_part(place, comparison.difference(place)) for place in comparison.places()],
        "experts": [
            {
                "block": str(block),
                "changed": found.changed,
                "chosen": found.total,
                "tokens": found.tokens,
            }
            for block, found in comparison.choices.items()
        ],
        "logits": [
            {
                "block": str(block),
                "kl": finite(found.kl / found.tokens),
                "same_likeliest": found.agreeing / found.tokens,
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
        "max_abs": finite(found.max_abs),
        "relative": finite(found.relative),
        "cosine": finite(found.cosine),
    }


def _verdict(report: Report) -> dict[str, Any]:
    verdict = report.verdict
    return {
        "mistakes": [
            {
                "side": found.side,
                "kind": found.kind,
                "name": found.name,
                "detail": found.detail,
                "judged_by_config_of": found.judged_by,
                "places": [str(place) for place in found.places],
            }
            for found in verdict.findings
        ],
        "audited": list(verdict.audited),
        "unexplained": [{"side": side, "place": str(place)} for side, place in verdict.unexplained],
    }
