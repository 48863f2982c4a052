"""Report of the GRPO study: one JSON object, from which page and plot are made."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from lowlat_lab.rewards.plan import Experiment
from lowlat_lab.study.machine import describe
from lowlat_lab.study.resumable import Result, RunResult
from lowlat_lab.study.statistics import Interval, interval, paired

Report = dict[str, Any]
Runs = Mapping[int, Result]
"""Results by seed."""

LAST_PART = 4
"""The final reward is the mean over the last quarter of the steps."""
RUN_KEYS = (
    "steps",
    "seconds",
    "cpu_seconds",
    "reward",
    "length",
    "entropy",
    "no_signal",
    "mismatch",
    "mismatch_means",
    "evaluations",
)
"""Figures of a run in the report."""
HOUR = 3600


def make_report(experiments: Sequence[Experiment], ran: Sequence[RunResult]) -> Report:
    """The report of all finished runs."""
    return {
        "study": "rewards",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe(),
        "experiments": [_entry(each, ran) for each in experiments],
        "failures": [
            {"variant": run.variant, "seed": run.seed, "reason": run.failure}
            for run in ran
            if run.failure is not None
        ],
    }


def _entry(experiment: Experiment, ran: Sequence[RunResult]) -> dict[str, Any]:
    by_variant: dict[str, Runs] = {
        variant.name: {
            run.seed: run.result
            for run in ran
            if run.variant == experiment.run_name(variant) and run.result is not None
        }
        for variant in experiment.variants
    }
    tuned = [r["fine_tuning_cpu_seconds"] for runs in by_variant.values() for r in runs.values()]
    settings = ("seeds", "steps", "batch_size", "num_generations", "learning_rate")
    return {
        "name": experiment.name,
        "model": experiment.model,
        "task": experiment.task,
        "label": experiment.reward_task.label,
        **{key: getattr(experiment, key) for key in settings},
        "held_out": experiment.held_out,
        "held_out_samples": experiment.held_out_samples,
        "fine_tuning_steps": experiment.fine_tuning and experiment.fine_tuning.steps,
        "fine_tuning_cpu_hours": max(tuned, default=0.0) / HOUR,
        "variants": [
            {"name": each.name, "label": each.label} | _figures(by_variant[each.name])
            for each in experiment.variants
        ],
        "comparisons": _comparisons(by_variant),
    }


def _figures(runs: Runs) -> dict[str, Any]:
    """Of one variant over its finished runs."""
    kept = [
        {"seed": seed} | {key: result[key] for key in RUN_KEYS if key in result}
        for seed, result in runs.items()
    ]
    if not runs:
        return {"runs": kept}
    means = [result["mismatch_means"] for result in runs.values() if "mismatch_means" in result]
    return {
        "runs": kept,
        "before": asdict(interval([pass_at_1(result, 0) for result in runs.values()])),
        "after": asdict(interval([pass_at_1(result, -1) for result in runs.values()])),
        "gain": asdict(interval([pass_at_1(own, -1) - pass_at_1(own, 0) for own in runs.values()])),
        "reward": asdict(interval(list(_last_rewards(runs).values()))),
        "cpu_hours": sum(result["cpu_seconds"] for result in runs.values()) / HOUR,
        "mismatch": max(max(result["mismatch"], default=0.0) for result in runs.values()),
        **{
            key: statistics.fmean(own[key] for own in means)
            for key in (means[0] if means else ())
            if means[0][key] is not None
        },
    }


def pass_at_1(result: Result, place: int) -> float:
    """pass@1 of an evaluation."""
    return result["evaluations"][place]["pass_at"]["1"]


def _last_rewards(runs: Runs) -> dict[int, float]:
    """Mean training reward of the last steps, by seed."""
    return {
        seed: statistics.fmean(result["reward"][-max(1, len(result["reward"]) // LAST_PART) :])
        for seed, result in runs.items()
    }


def _comparisons(by_variant: Mapping[str, Runs]) -> list[dict[str, Any]]:
    """Every variant minus the first, over the common seeds."""
    first, *others = by_variant
    found = []
    for name in others:
        after = {
            each: {seed: pass_at_1(own, -1) for seed, own in by_variant[each].items()}
            for each in (first, name)
        }
        rewards = {each: _last_rewards(by_variant[each]) for each in (first, name)}
        difference = paired(after[name], after[first])
        reward = paired(rewards[name], rewards[first])
        if difference is not None and reward is not None:
            found.append(
                {
                    "left": name,
                    "right": first,
                    "after": asdict(difference),
                    "reward": asdict(reward),
                }
            )
    return found


def curve(variant: Mapping[str, Any]) -> list[tuple[float, Interval]]:
    """Held-out pass@1 over steps, with intervals over seeds."""
    by_step: dict[int, list[float]] = {}
    for run in variant["runs"]:
        for each in run["evaluations"]:
            by_step.setdefault(each["step"], []).append(each["pass_at"]["1"])
    return [(float(step), interval(values)) for step, values in sorted(by_step.items())]


def reward_curve(variant: Mapping[str, Any], *, window: int) -> list[tuple[float, Interval]]:
    """Mean reward of `window` steps, over the middle step, with intervals over seeds."""
    runs = [run["reward"] for run in variant["runs"]]
    length = min(map(len, runs), default=0)
    found = []
    for first in range(0, length - window + 1, window):
        means = [statistics.fmean(each[first : first + window]) for each in runs]
        found.append((first + (window + 1) / 2, interval(means)))
    return found
