"""Study runner: trains every variant with every seed, each in its own folder; resumable.

OUT/VARIANT/seed-N/             run folder of `lowlat train`
OUT/VARIANT/seed-N/result.json  present once the run is trained and measured
"""

import shutil
import statistics
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lowlat.data.dataset import TokenizedDataset
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.metrics.jsonl import RunHistory, read_log
from lowlat.train.metrics.metrics_log import FolderMetricsLog
from lowlat.train.recipe.schema import Recipe
from lowlat.train.recipe.toml import to_toml
from lowlat.train.run.trainer import MODEL_FOLDER, Trainer
from lowlat.utils.progress import Progress
from lowlat_lab.study.measure import measure
from lowlat_lab.study.plan import StudyPlan, Variant
from lowlat_lab.study.resumable import (
    Result,
    RunResult,
    Stopped,
    StudyRun,
    TaskView,
    run_missing,
    write_result,
)

LAST_PART = 20
"""Final expert load is the mean over the last twentieth of the steps."""

Measure = Callable[[Path, Recipe, Progress], dict[str, Any]]
"""Measures the model in a folder, trained by a recipe."""


def run_folder(out: Path, variant: Variant, seed: int) -> Path:
    """Path of a run folder."""
    return out / variant.name / f"seed-{seed}"


def run_all(
    plan: StudyPlan,
    data: TokenizedDataset,
    out: Path,
    progress: Progress,
    *,
    also: Measure | None = None,
) -> list[RunResult]:
    """The runs of `plan`: finished runs are read from their folders, and up to `plan.limit` of the
    others are trained, an interrupted run from its last checkpoint.

    also: an additional measurement of every trained model. Raises as `run_missing`.
    """
    runs = [
        StudyRun(
            variant=variant.name,
            seed=seed,
            folder=run_folder(out, variant, seed),
            identity=identity(plan.recipe(variant, seed), data),
            run=partial(_run, plan, variant, seed, data, out, also),
        )
        for variant, seed in plan.runs
    ]
    return run_missing(f"{plan.kind} study", runs, plan.limit, progress)


def identity(recipe: Recipe, data: TokenizedDataset) -> dict[str, Any]:
    """Identity of a run: recipe and data fingerprint."""
    return recipe.model_dump(mode="json") | {"data": data.fingerprint}


def _run(
    plan: StudyPlan,
    variant: Variant,
    seed: int,
    data: TokenizedDataset,
    out: Path,
    also: Measure | None,
    progress: Progress,
) -> Result:
    """Train, measure, write the result, and remove the training checkpoints."""
    recipe = plan.recipe(variant, seed)
    with RunFolder(run_folder(out, variant, seed)) as run:
        with progress.task(f"{variant.name}, seed {seed}", plan.steps) as task:
            log = FolderMetricsLog(run, view=TaskView(task), tensorboard_wanted=False)
            with closing(log):
                run.write_recipe(to_toml(plan.raw_recipe(variant, seed)))
                outcome = Trainer(recipe, run, log, base=Path("/"), origin=recipe.name).run()
        if outcome.model is None:
            raise Stopped
        held_out = measure(
            outcome.model, recipe, most_windows=plan.size.held_out_windows, progress=progress
        )
        result = _training(read_log(run.log))
        result |= asdict(held_out) | {"loss": held_out.loss}
        result |= {"standard_error": held_out.standard_error}
        result["window_losses"] = [round(loss, 6) for loss in held_out.window_losses]
        if also is not None:
            result |= also(outcome.model, recipe, progress)
        result = write_result(run.path, identity(recipe, data), result)
        shutil.rmtree(run.checkpoints)
    return result


def _training(history: RunHistory) -> dict[str, Any]:
    """Speed, loss curve and final expert load from the training log."""
    steps = history.steps
    last = steps[-max(1, len(steps) // LAST_PART) :]
    return {
        "steps": steps[-1].step,
        "tokens": steps[-1].tokens,
        "seconds": steps[-1].seconds,
        "tokens_per_second": statistics.median(step.tokens_per_second for step in steps),
        "memory_bytes": steps[-1].memory_bytes,
        "train_loss": statistics.fmean(step.loss for step in last if step.loss is not None),
        "curve": [[record.tokens, record.loss] for record in history.evaluations],
        "train_max_violations": [
            statistics.fmean(step.experts[place].max_violation for step in last)
            for place in range(len(last[0].experts))
        ],
    }


def model_folder(out: Path, variant: str, seed: int) -> Path:
    """The trained model of a finished run."""
    return out / variant / f"seed-{seed}" / MODEL_FOLDER
