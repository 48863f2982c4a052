"""`lowlat study balance`: experts kept busy by a routing bias, by an auxiliary loss, by nothing.

Owns its arms and what is reported besides the loss: MaxVio, the largest load of an expert over the
mean load, minus 1 (arXiv 2408.15664), of the last training steps and of the held-out text.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowlat.data.dataset import TokenizedDataset
from lowlat.utils.progress import Progress
from lowlat_lab.study.experts import expert_table
from lowlat_lab.study.plan import Arm, Plan
from lowlat_lab.study.report import Report, make_report
from lowlat_lab.study.run import run_all
from lowlat_lab.study.sizes import Size
from lowlat_lab.study.statistics import interval

SPEED, COMPLEMENT = 1e-3, 1e-4
"""Gamma and alpha of DeepSeek-V3."""
AUXILIARY = (1e-3, 1e-2)
"""Weights of the loss where it balances alone: those of arXiv 2408.15664."""


def balance_arms(size: Size) -> tuple[Arm, ...]:
    """V3's bias first, then auxiliary losses, then nothing."""
    model = expert_table(size, mtp=0)
    auxiliary = [
        Arm(
            name=f"loss-{alpha:g}",
            label=f"loss {alpha:g}",
            model=model,
            sequence_weight=alpha,
            bias_update_speed=0.0,
        )
        for alpha in AUXILIARY
    ]
    return (
        Arm(
            name="bias",
            label="bias",
            model=model,
            sequence_weight=COMPLEMENT,
            bias_update_speed=SPEED,
        ),
        *auxiliary,
        Arm(name="none", label="nothing", model=model, sequence_weight=0.0, bias_update_speed=0.0),
    )


def study(
    plan: Plan, data: TokenizedDataset, out: Path, progress: Progress, command: str
) -> Report:
    """Run all of it, or what is left of it, and report."""
    ran = run_all(plan, data, out, progress)
    report = make_report(plan, data, ran, command=command)
    for entry in report["arms"]:
        if entry["runs"]:
            for key in ("train_max_violations", "max_violations"):
                entry[f"{key}_mean"] = _over(entry["runs"], key, statistics.fmean)
                entry[f"{key}_worst"] = _over(entry["runs"], key, max)
    return report


def _over(
    runs: Sequence[dict[str, Any]], key: str, over: Callable[[list[float]], float]
) -> dict[str, Any]:
    """Interval over seeds of a figure that every layer has."""
    return asdict(interval([over(run[key]) for run in runs]))
