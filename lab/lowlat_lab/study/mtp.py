"""`lowlat-lab study mtp`: one main model trained with and without a multi-token prediction module.

Reports the acceptance rate of the module's draft tokens.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowlat.config.parameter_count import count_parameters
from lowlat.data.dataset import TokenizedDataset
from lowlat.train.recipe.schema import Recipe
from lowlat.utils.progress import Progress
from lowlat_lab.study.experts import expert_table
from lowlat_lab.study.measure import drafts
from lowlat_lab.study.plan import StudyPlan, Variant, config_of
from lowlat_lab.study.report import DRAFT_KEYS, Report, make_report
from lowlat_lab.study.run import run_all
from lowlat_lab.study.sizes import StudySize
from lowlat_lab.study.statistics import interval

DRAFT_WINDOWS = 64
"""Held-out windows for the acceptance rate."""


def mtp_variants(size: StudySize) -> tuple[Variant, ...]:
    """Without a module first, then with one."""
    return (
        Variant(name="off", label="without MTP", model=expert_table(size, mtp=0)),
        Variant(name="on", label="with MTP", model=expert_table(size, mtp=1)),
    )


def study(
    plan: StudyPlan, data: TokenizedDataset, out: Path, progress: Progress, command: str
) -> Report:
    """Run or resume the study, and report."""

    def measure_drafts(folder: Path, recipe: Recipe, progress: Progress) -> dict[str, Any]:
        length = recipe.phase[0].sequence_length
        with progress.task("drafts"):
            return asdict(drafts(folder, data, length=length, windows=DRAFT_WINDOWS))

    ran = run_all(plan, data, out, progress, also=measure_drafts)
    report = make_report(plan, data, ran, command=command)
    for variant, entry in zip(plan.variants, report["variants"], strict=True):
        count = count_parameters(config_of(variant.model, data.vocab_size))
        entry |= {"parameters": count.total, "active": count.active, "mtp_parameters": count.mtp}
        for key in (*DRAFT_KEYS, "mtp_losses"):
            values = [run[key][0] for run in entry["runs"] if run[key]]
            if values:
                entry[f"{key}_mean"] = asdict(interval(values))
    return report
