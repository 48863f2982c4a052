"""`lowlat study mtp`: the same main model trained with a multi-token prediction module and without.

Owns its arms and what is reported besides the loss: how often a draft is kept.
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
from lowlat_lab.study.plan import Arm, Plan, config_of
from lowlat_lab.study.report import DRAFT_KEYS, Report, make_report
from lowlat_lab.study.run import run_all
from lowlat_lab.study.sizes import Size
from lowlat_lab.study.statistics import interval

DRAFT_WINDOWS = 64
"""Windows of held-out text on which drafts are judged."""


def mtp_arms(size: Size) -> tuple[Arm, ...]:
    """Without a module first, then with one."""
    return (
        Arm(name="off", label="without MTP", model=expert_table(size, mtp=0)),
        Arm(name="on", label="with MTP", model=expert_table(size, mtp=1)),
    )


def study(
    plan: Plan, data: TokenizedDataset, out: Path, progress: Progress, command: str
) -> Report:
    """Run all of it, or what is left of it, and report."""

    def judged(folder: Path, recipe: Recipe, progress: Progress) -> dict[str, Any]:
        length = recipe.phase[0].sequence_length
        with progress.task("drafts"):
            return asdict(drafts(folder, data, length=length, windows=DRAFT_WINDOWS))

    ran = run_all(plan, data, out, progress, also=judged)
    report = make_report(plan, data, ran, command=command)
    for arm, entry in zip(plan.arms, report["arms"], strict=True):
        count = count_parameters(config_of(arm.model, data.vocab_size))
        entry |= {"parameters": count.total, "active": count.active, "mtp_parameters": count.mtp}
        for key in (*DRAFT_KEYS, "mtp_losses"):
            values = [run[key][0] for run in entry["runs"] if run[key]]
            if values:
                entry[f"{key}_mean"] = asdict(interval(values))
    return report
