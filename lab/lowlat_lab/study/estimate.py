"""Duration estimate of a study, from a few steps of every variant."""

import tempfile
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.metrics.metrics_log import MetricsLog
from lowlat.train.metrics.record import EvalRecord, StartRecord, StepRecord
from lowlat.train.run.trainer import Trainer
from lowlat.utils.progress import Progress
from lowlat_lab.study.plan import StudyPlan, Variant

STEPS = 4
"""Steps to time; the fastest counts."""
EVALUATION = 0.5
"""Time of a held-out token over that of a training token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Estimated seconds."""

    step_seconds: dict[str, float]
    """Time of one optimizer step, by variant."""
    seconds: float
    """Time of the whole study: training and held-out losses, without decoding."""


def estimate(plan: StudyPlan, progress: Progress) -> Estimate:
    """Train every variant for a few steps, in a temporary folder."""
    found = {}
    with progress.task("a few steps of each variant", len(plan.variants)) as task:
        for variant in plan.variants:
            found[variant.name] = _step_seconds(plan, variant)
            task.advance()
    size = plan.size
    held_out = size.held_out_windows * size.sequence_length / size.tokens_per_step * EVALUATION
    runs = sum(found.values()) * len(plan.seeds)
    return Estimate(step_seconds=found, seconds=runs * (plan.steps + held_out))


def _step_seconds(plan: StudyPlan, variant: Variant) -> float:
    short = replace(plan, steps=STEPS)
    log = _StepTimes()
    with tempfile.TemporaryDirectory() as folder, RunFolder(Path(folder) / "run") as run:
        with closing(log):
            Trainer(short.recipe(variant, plan.seeds[0]), run, log, base=Path("/")).run()
    return min(log.seconds)


@final
class _StepTimes(MetricsLog):
    """Records step durations."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def start(self, record: StartRecord) -> None:
        pass

    def step(self, record: StepRecord) -> None:
        self.seconds.append(record.batch_tokens / record.tokens_per_second)

    def evaluation(self, record: EvalRecord) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def status(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass
