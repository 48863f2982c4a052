"""`lowlat-lab study balance`: expert load balancing by a routing bias, an auxiliary loss, or none.

Reports MaxVio (arXiv 2408.15664), the largest load of an expert over the mean load, minus 1, for
the last training steps and the held-out text.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowlat.data.dataset import TokenizedDataset
from lowlat.utils.progress import Progress
from lowlat_lab.study.experts import expert_table
from lowlat_lab.study.plan import StudyPlan, Variant
from lowlat_lab.study.report import Report, make_report
from lowlat_lab.study.run import run_all
from lowlat_lab.study.sizes import StudySize
from lowlat_lab.study.statistics import interval

SPEED, COMPLEMENT = 1e-3, 1e-4
"""DeepSeek-V3's bias update speed (gamma) and weight of the sequence-wise loss (alpha)."""
AUXILIARY_WEIGHTS = (1e-3, 1e-2)
"""Weights of the auxiliary loss in variants without a bias, from arXiv 2408.15664."""


def balance_variants(size: StudySize) -> tuple[Variant, ...]:
    """DeepSeek-V3's bias first, then auxiliary losses, then none."""
    model = expert_table(size, mtp=0)
    auxiliary = [
        Variant(
            name=f"loss-{alpha:g}",
            label=f"loss {alpha:g}",
            model=model,
            sequence_weight=alpha,
            bias_update_speed=0.0,
        )
        for alpha in AUXILIARY_WEIGHTS
    ]
    return (
        Variant(
            name="bias",
            label="bias",
            model=model,
            sequence_weight=COMPLEMENT,
            bias_update_speed=SPEED,
        ),
        *auxiliary,
        Variant(
            name="none", label="nothing", model=model, sequence_weight=0.0, bias_update_speed=0.0
        ),
    )


def study(
    plan: StudyPlan, data: TokenizedDataset, out: Path, progress: Progress, command: str
) -> Report:
    """Run or resume the study, and report."""
    ran = run_all(plan, data, out, progress)
    report = make_report(plan, data, ran, command=command)
    for entry in report["variants"]:
        if entry["runs"]:
            for key in ("train_max_violations", "max_violations"):
                entry[f"{key}_mean"] = _over(entry["runs"], key, statistics.fmean)
                entry[f"{key}_worst"] = _over(entry["runs"], key, max)
    return report


def _over(
    runs: Sequence[dict[str, Any]], key: str, over: Callable[[list[float]], float]
) -> dict[str, Any]:
    """Interval over seeds of a per-layer figure."""
    return asdict(interval([over(run[key]) for run in runs]))
