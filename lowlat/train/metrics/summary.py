"""Summary of a run as one JSON object: losses, throughput, MFU, memory, expert balance.

Final losses and balance are means over the last steps, because single steps are noisy. Throughput
is a median, which is robust against pauses.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

from lowlat.train.metrics.jsonl import RunHistory
from lowlat.train.metrics.record import EvalRecord, ExpertRecord, StepRecord
from lowlat.utils.errors import UserError

Summary = dict[str, Any]

_ROLLOUTS = ("reward", "length", "truncated", "no_signal", "entropy", "kl", "clipped")
"""Summarized fields of the rollouts of GRPO steps."""
_LAST_PART, _MOST_LAST_STEPS = 20, 100
"""The end of a run: its last twentieth, at most 100 steps."""


def summarise(history: RunHistory) -> Summary:
    """Summarize a finished or active run.

    Losses and divergences are in nats per target, `mfu` is a fraction, `seconds` is over all
    resumptions. `loss`, `divergence`, `layer_error`, `mtp_losses` and the `_last` values of experts
    are means over the last `mean_of_steps` steps. None is unknown.

    Raises UserError without a completed step.
    """
    steps = history.steps
    if not steps:
        raise UserError(f"{history.path}: no step is done yet; try again later")
    window = max(1, min(_MOST_LAST_STEPS, len(steps) // _LAST_PART))
    last, ending = steps[-1], steps[-window:]
    start = history.start
    mfu = [step.mfu for step in steps if step.mfu is not None]
    has_rollouts = any(step.rollouts is not None for step in steps)
    # In GRPO, `last.tokens` counts rows of sequence_length, and rows are shorter.
    mean = statistics.fmean(step.batch_tokens for step in steps)
    tokens = round(mean * last.step) if has_rollouts else last.tokens
    return {
        "name": start.name,
        "log": str(history.path),
        "facts": start.facts,
        "started": history.starts[0].time,
        "runs": len(history.starts),
        "superseded_steps": history.superseded,
        "torn_last_line": history.torn,
        "step": last.step,
        "total_steps": start.total_steps,
        "finished": last.step >= start.total_steps,
        "tokens": tokens,
        "tokens_total": None if has_rollouts else start.tokens_total,
        "seconds": last.seconds,
        "mean_of_steps": window,
        "loss": _mean([step.loss for step in ending]),
        "divergence": _mean([step.divergence for step in ending]),
        "layer_error": _mean([step.layer_error for step in ending]),
        "mtp_losses": _column_means([step.mtp_losses for step in ending]),
        "evaluations": _evaluations(history.evaluations),
        "tokens_per_second": statistics.median(step.tokens_per_second for step in steps),
        "tokens_per_second_overall": tokens / last.seconds if last.seconds else None,
        "mfu": statistics.median(mfu) if mfu else None,
        "memory_bytes": max(step.memory_bytes for step in steps),
        "rollouts": _rollouts(steps, ending),
        "experts": _experts(steps, ending),
        "indexers": _indexers(steps, ending),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of the known values; None without any."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _column_means(rows: Sequence[tuple[float, ...]]) -> list[float]:
    """Column means over rows of different lengths: steps may differ in MTP modules with targets."""
    columns = zip_longest(*rows)
    return [statistics.fmean(x for x in column if x is not None) for column in columns]


def _evaluations(records: Sequence[EvalRecord]) -> dict[str, Any]:
    """First, best and last evaluation of each split."""
    found = {}
    for split in dict.fromkeys(record.split for record in records):
        of_split = [record for record in records if record.split == split]
        best = min(of_split, key=_badness)
        places = {"first": of_split[0], "best": best, "last": of_split[-1]}
        found[split] = {
            place: {k: v for k, v in asdict(record).items() if k not in ("tokens", "split")}
            for place, record in places.items()
        }
    return found


def _badness(record: EvalRecord) -> tuple[bool, float]:
    """The loss, or minus the first pass@k."""
    figures = record.pass_at_k
    value = record.loss if figures is None else -next(iter(figures.pass_at.values()))
    # NaN compares as false with every number, so it must sort last explicitly.
    return value is None or value != value, value or 0.0


def _rollouts(steps: Sequence[StepRecord], ending: Sequence[StepRecord]) -> dict[str, float | None]:
    """Fields of the first GRPO step, and their means at the end; empty without one."""
    first = next((step.rollouts for step in steps if step.rollouts is not None), None)
    if first is None:
        return {}
    last = [step.rollouts for step in ending if step.rollouts is not None]
    found: dict[str, float | None] = {}
    for name in _ROLLOUTS:
        found[f"{name}_first"] = getattr(first, name)
        found[f"{name}_last"] = _mean([getattr(each, name) for each in last])
    return found


def _experts(steps: Sequence[StepRecord], ending: Sequence[StepRecord]) -> list[dict[str, Any]]:
    """Balance of each MoE layer at its first step, at its worst step, and at the end."""
    courses, lasts = _by_layer(steps), _by_layer(ending)
    layers = []
    for layer in sorted(courses):
        course = courses[layer]
        # Phases that match attention run no experts; after them, use the last known record.
        last = lasts.get(layer, course[-1:])
        layers.append(
            {
                "layer": layer,
                "max_violation_first": course[0].max_violation,
                "max_violation_highest": max(e.max_violation for e in course),
                "max_violation_last": statistics.fmean(e.max_violation for e in last),
                "entropy_first": course[0].entropy,
                "entropy_last": statistics.fmean(e.entropy for e in last),
                "bias_min_last": last[-1].bias_min,
                "bias_max_last": last[-1].bias_max,
            }
        )
    return layers


def _indexers(steps: Sequence[StepRecord], ending: Sequence[StepRecord]) -> list[dict[str, Any]]:
    """Loss and recall of the indexer of each sparse layer at its first step and at the end."""
    firsts = {layer.layer: layer for step in reversed(steps) for layer in step.indexers}
    found = []
    for number, first in sorted(firsts.items()):
        last = [layer for step in ending for layer in step.indexers if layer.layer == number]
        found.append(
            {
                "layer": number,
                "kl_first": first.kl,
                "kl_last": statistics.fmean(layer.kl for layer in last),
                "recall_first": first.recall,
                "recall_last": statistics.fmean(layer.recall for layer in last),
            }
        )
    return found


def _by_layer(steps: Sequence[StepRecord]) -> dict[int, list[ExpertRecord]]:
    """Records of each MoE layer, in order of steps."""
    found: dict[int, list[ExpertRecord]] = {}
    for step in steps:
        for record in step.experts:
            found.setdefault(record.layer, []).append(record)
    return found
