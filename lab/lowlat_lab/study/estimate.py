"""How long a study will take here, from a few steps of every arm. Owns the estimate."""

import tempfile
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.metrics.metrics_log import MetricsLog
from lowlat.train.metrics.record import EvalRecord, StepRecord
from lowlat.train.run.trainer import Trainer
from lowlat.utils.progress import Progress
from lowlat_lab.study.plan import Arm, Plan

STEPS = 4
"""Steps that are tried; the quickest counts."""
EVALUATION = 0.5
"""Time of a held-out token over that of a training token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Seconds by arm."""

    step_seconds: dict[str, float]
    """Of one optimiser step."""
    seconds: float
    """Of the whole study: training and held-out losses, without decoding."""


def estimate(plan: Plan, progress: Progress) -> Estimate:
    """Train every arm for a moment, in a folder that goes again."""
    found = {}
    with progress.task("a few steps of each arm", len(plan.arms)) as task:
        for arm in plan.arms:
            found[arm.name] = _step_seconds(plan, arm)
            task.advance()
    size = plan.size
    held_out = size.held_out_windows * size.sequence_length / size.tokens_per_step * EVALUATION
    runs = sum(found.values()) * len(plan.seeds)
    return Estimate(step_seconds=found, seconds=runs * (plan.steps + held_out))


def _step_seconds(plan: Plan, arm: Arm) -> float:
    short = replace(plan, steps=STEPS)
    log = _StepTimes()
    with tempfile.TemporaryDirectory() as folder, RunFolder(Path(folder) / "run") as run:
        with closing(log):
            Trainer(short.recipe(arm, plan.seeds[0]), run, log, base=Path("/")).run()
    return min(log.seconds)


@final
class _StepTimes(MetricsLog):
    """Keeps how long steps take."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def start(self, **_facts: object) -> None:
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
