"""`lowlat study precision`: the same model trained in bf16, in the FP8 of DeepSeek-V3, and in fp32.

Owns its arms and what is reported besides the loss: losses relative to bf16's, of the last training
steps and of held-out text. The DeepSeek-V3 report (section 3.3) has FP8 within 0.25 % of bf16.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lowlat.data.dataset import TokenizedDataset
from lowlat.utils.progress import Progress
from lowlat_lab.study.experts import expert_table
from lowlat_lab.study.findings import by_arm
from lowlat_lab.study.plan import Arm, Plan
from lowlat_lab.study.report import Report, make_report
from lowlat_lab.study.run import Ran, run_all
from lowlat_lab.study.sizes import Size
from lowlat_lab.study.statistics import Interval, interval

BOUND = 0.0025
"""Of the relative difference of losses, by the DeepSeek-V3 report."""


def precision_arms(size: Size) -> tuple[Arm, ...]:
    """bf16 first, then FP8, then fp32."""
    model = expert_table(size, mtp=0)
    labels = {"bf16": "bf16", "fp8": "FP8", "fp32": "fp32"}
    return tuple(
        Arm(name=name, label=label, model=model, precision=name) for name, label in labels.items()
    )


def study(
    plan: Plan, data: TokenizedDataset, out: Path, progress: Progress, command: str
) -> Report:
    """Run all of it, or what is left of it, and report."""
    ran = run_all(plan, data, out, progress)
    report = make_report(plan, data, ran, command=command)
    for entry in report["arms"]:
        for key in ("train_loss", "loss"):
            found = relative(ran, entry["name"], plan.baseline.name, key)
            if found is not None:
                entry[f"{key}_relative"] = asdict(found)
    return report


def relative(ran: Sequence[Ran], arm: str, base: str, key: str) -> Interval | None:
    """(arm - base) / base of a loss, over the seeds both have; None for the base itself."""
    losses = by_arm(ran, key)
    own, other = losses.get(arm, {}), losses.get(base, {})
    shares = [own[seed] / other[seed] - 1 for seed in own if seed in other]
    return interval(shares) if shares and arm != base else None
