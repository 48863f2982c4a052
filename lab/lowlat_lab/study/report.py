"""Study report: one JSON object, from which tables, plots and pages are made.

Losses are nats per token of the exported models on the same held-out windows.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from lowlat.data.dataset import TokenizedDataset
from lowlat_lab.study.comparison import compare
from lowlat_lab.study.machine import describe
from lowlat_lab.study.plan import StudyPlan
from lowlat_lab.study.resumable import Result, RunResult
from lowlat_lab.study.statistics import interval

Report = dict[str, Any]

DRAFT_KEYS = ("acceptance", "draft_hits", "main_hits")
"""Figures of a run that only the MTP study has."""
RUN_KEYS = (
    "steps",
    "tokens",
    "seconds",
    "tokens_per_second",
    "memory_bytes",
    "loss",
    "standard_error",
    "mtp_losses",
    "max_violations",
    "train_loss",
    "train_max_violations",
    "curve",
    "tasks",
    *DRAFT_KEYS,
)
"""Figures of a run in the report."""


def make_report(
    plan: StudyPlan,
    data: TokenizedDataset,
    ran: Sequence[RunResult],
    *,
    command: str,
    pairs: Sequence[tuple[str, str]] | None = None,
) -> Report:
    """The report that all studies share. pairs: variants to compare, by default every variant with
    the first. command: the command line.
    """
    names = [variant.name for variant in plan.variants]
    if pairs is None:
        pairs = [(name, names[0]) for name in names[1:]]
    return {
        "study": plan.kind,
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe(),
        "data": {
            "folder": plan.data.name,
            "fingerprint": data.fingerprint,
            "vocab_size": data.vocab_size,
            "train_tokens": data.num_tokens("train"),
            "held_out_tokens": data.num_tokens("held_out"),
        },
        "size": asdict(plan.size),
        "optimizer": plan.recipe(plan.baseline, plan.seeds[0]).optimizer.name,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "seeds": list(plan.seeds),
        "held_out_windows": next(
            (len(run.result["window_losses"]) for run in ran if run.result is not None), 0
        ),
        "variants": [
            variant_entry(plan, ran, variant.name, variant.label) for variant in plan.variants
        ],
        "comparisons": [item.as_json() for item in compare(ran, pairs, names)],
        "failures": [
            {"variant": run.variant, "seed": run.seed, "reason": run.failure}
            for run in ran
            if run.failure is not None
        ],
    }


def variant_entry(
    plan: StudyPlan, ran: Sequence[RunResult], name: str, label: str
) -> dict[str, Any]:
    """A variant's figures over its finished runs; without `loss` if there are none."""
    runs = {run.seed: run.result for run in ran if run.variant == name and run.result is not None}
    base = {
        run.seed: run.result
        for run in ran
        if run.variant == plan.baseline.name and run.result is not None
    }
    entry: dict[str, Any] = {
        "name": name,
        "label": label,
        "runs": [{"seed": seed} | _kept(result) for seed, result in runs.items()],
    }
    if not runs:
        return entry
    speeds = {seed: result["tokens_per_second"] for seed, result in runs.items()}
    ratios = [speeds[seed] / base[seed]["tokens_per_second"] for seed in speeds if seed in base]
    return entry | {
        "loss": asdict(interval([result["loss"] for result in runs.values()])),
        "standard_error": _mean([result["standard_error"] for result in runs.values()]),
        "train_tokens_per_second": statistics.median(speeds.values()),
        "train_ratio": statistics.median(ratios) if ratios else None,
    }


def labels_of(report: Report) -> dict[str, str]:
    """Labels by variant name."""
    return {variant["name"]: variant["label"] for variant in report["variants"]}


def find_comparison(report: Report, left: str, right: str) -> dict[str, Any] | None:
    """The comparison of two variants, if there is one, inverted if necessary."""
    for item in report["comparisons"]:
        if (item["left"], item["right"]) == (left, right):
            return item
        if (item["left"], item["right"]) == (right, left):
            return _inverted(item)
    return None


def _inverted(item: dict[str, Any]) -> dict[str, Any]:
    other = {"lower": "higher", "higher": "lower"}
    verdicts = {key: other.get(item[key], item[key]) for key in ("verdict", "pooled_verdict")}
    difference = item["difference"] | {"mean": -item["difference"]["mean"]}
    inverted = {"left": item["right"], "right": item["left"], "difference": difference}
    return item | inverted | verdicts


def _kept(result: Result) -> dict[str, Any]:
    return {key: result[key] for key in RUN_KEYS if key in result}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
