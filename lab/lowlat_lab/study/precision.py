"""`lowlat-lab study precision`: one model trained in bf16, in DeepSeek-V3's FP8 and in fp32.

Reports losses relative to bf16's, in the last training steps and on held-out text. The DeepSeek-V3
report (section 3.3) has FP8 within 0.25 % of bf16.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lowlat.data.dataset import TokenizedDataset
from lowlat.utils.progress import Progress
from lowlat_lab.study.comparison import by_variant
from lowlat_lab.study.experts import expert_table
from lowlat_lab.study.plan import StudyPlan, Variant
from lowlat_lab.study.report import Report, make_report
from lowlat_lab.study.resumable import RunResult
from lowlat_lab.study.run import run_all
from lowlat_lab.study.sizes import StudySize
from lowlat_lab.study.statistics import Interval, interval


def precision_variants(size: StudySize) -> tuple[Variant, ...]:
    """bf16 first, then FP8, then fp32."""
    model = expert_table(size, mtp=0)
    labels = {"bf16": "bf16", "fp8": "FP8", "fp32": "fp32"}
    return tuple(
        Variant(name=name, label=label, model=model, precision=name)
        for name, label in labels.items()
    )


def study(
    plan: StudyPlan, data: TokenizedDataset, out: Path, progress: Progress, command: str
) -> Report:
    """Run or resume the study, and report."""
    ran = run_all(plan, data, out, progress)
    report = make_report(plan, data, ran, command=command)
    for entry in report["variants"]:
        for key in ("train_loss", "loss"):
            found = relative(ran, entry["name"], plan.baseline.name, key)
            if found is not None:
                entry[f"{key}_relative"] = asdict(found)
    return report


def relative(ran: Sequence[RunResult], variant: str, base: str, key: str) -> Interval | None:
    """(variant - base) / base of a loss, over the seeds both have; None for the base itself."""
    losses = by_variant(ran, key)
    own, other = losses.get(variant, {}), losses.get(base, {})
    shares = [own[seed] / other[seed] - 1 for seed in own if seed in other]
    return interval(shares) if shares and variant != base else None
