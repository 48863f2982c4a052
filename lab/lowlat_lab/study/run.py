"""Runs every arm with every seed, each in its own folder, and goes on where it was stopped.

    OUT/ARM/seed-N/             a run's folder, as `lowlat train` makes it
    OUT/ARM/seed-N/result.json  there once the run is trained and measured: it is not done again

Owns the order, what is kept, and that one run's failure leaves the others alone.
"""

import json
import shutil
import statistics
import sys
import traceback
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from lowlat.data.dataset import TokenizedDataset
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.metrics.jsonl import RunHistory, read_log
from lowlat.train.metrics.metrics_log import FolderMetricsLog
from lowlat.train.metrics.progress_view import ProgressView
from lowlat.train.metrics.record import EvalRecord, StartRecord, StepRecord
from lowlat.train.recipe.schema import Recipe
from lowlat.train.recipe.toml import to_toml
from lowlat.train.run.trainer import MODEL_FOLDER, Trainer
from lowlat.utils.atomic_files import replace_file
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, Task
from lowlat.utils.strict_json import parse_object
from lowlat_lab.study.measure import measure
from lowlat_lab.study.plan import Arm, Plan

RESULT = "result.json"
LAST_PART = 20
"""Balance at the end is the mean over the last twentieth of the steps."""

Result = dict[str, Any]
Measure = Callable[[Path, Recipe, Progress], dict[str, Any]]
"""What a study measures besides: of the model in a folder, trained by a recipe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """What came of one run."""

    arm: str
    seed: int
    result: Result | None
    """As result.json holds it; None where the run failed."""
    failure: str | None = None
    """Why it failed, in one line."""


class Stopped(KeyboardInterrupt):
    """The study was asked to stop; what is done is kept."""


def run_folder(out: Path, arm: Arm, seed: int) -> Path:
    """Where a run lies."""
    return out / arm.name / f"seed-{seed}"


def run_all(
    plan: Plan,
    data: TokenizedDataset,
    out: Path,
    progress: Progress,
    *,
    also: Measure | None = None,
) -> list[Ran]:
    """Every run of `plan`, those already finished taken from their folders.

    also: measured of every trained model besides what all studies measure. Raises UserError, before
    anything is trained, where `out` holds runs with other settings; Stopped on SIGINT or SIGTERM.
    """
    known = {
        (arm.name, seed): read_result(run_folder(out, arm, seed), plan.recipe(arm, seed), data)
        for arm, seed in plan.runs
    }
    found = []
    with progress.task(f"{plan.kind} study", len(plan.runs)) as task:
        for arm, seed in plan.runs:
            result = known[arm.name, seed]
            if result is None:
                found.append(_attempt(plan, arm, seed, data, out, progress, also))
            else:
                found.append(Ran(arm=arm.name, seed=seed, result=result))
            task.advance()
    return found


def read_result(folder: Path, recipe: Recipe, data: TokenizedDataset) -> Result | None:
    """The result in a run's folder; None where it is not finished.

    Raises UserError where it is of another recipe or other data, saying what differs.
    """
    file = folder / RESULT
    if not file.is_file():
        return None
    result = parse_object(file.read_bytes(), str(file))
    wanted = identity(recipe, data)
    differences = list(_differences(result.get("identity"), wanted))
    if differences:
        raise UserError(
            f"{folder}: holds a run of another study: {'; '.join(differences[:3])}; "
            "name another --out or give the options it was run with"
        )
    return result


def identity(recipe: Recipe, data: TokenizedDataset) -> dict[str, Any]:
    """What makes two runs the same: recipe and data, wherever the data lies."""
    return recipe.model_dump(mode="json") | {"data": data.fingerprint}


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            text
            for key in sorted(old.keys() | new.keys())
            for text in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            text
            for place, (left, right) in enumerate(zip(old, new, strict=True))
            for text in _differences(left, right, f"{path}.{place}")
        ]
    return [] if old == new else [f"{path} was {old!r} and would be {new!r}"]


def _attempt(
    plan: Plan,
    arm: Arm,
    seed: int,
    data: TokenizedDataset,
    out: Path,
    progress: Progress,
    also: Measure | None,
) -> Ran:
    folder = run_folder(out, arm, seed)
    try:
        return Ran(
            arm=arm.name, seed=seed, result=_run(plan, arm, seed, data, folder, progress, also)
        )
    except UserError as error:
        failure = str(error)
    # Hours of other runs must not be lost to a fault in this one; the report tells it.
    except Exception as error:
        traceback.print_exc()
        failure = f"{type(error).__name__}: {error}"
    print(f"{arm.name}, seed {seed}: failed: {failure}", file=sys.stderr)
    return Ran(arm=arm.name, seed=seed, result=None, failure=failure.splitlines()[0])


def _run(
    plan: Plan,
    arm: Arm,
    seed: int,
    data: TokenizedDataset,
    folder: Path,
    progress: Progress,
    also: Measure | None,
) -> Result:
    """Train, measure, write down; the saves go, since nothing goes on from them."""
    recipe = plan.recipe(arm, seed)
    with RunFolder(folder) as run:
        with progress.task(f"{arm.name}, seed {seed}", plan.steps) as task:
            log = FolderMetricsLog(
                log=run.log,
                tensorboard_folder=run.tensorboard,
                view=_TaskView(task),
                tensorboard_wanted=False,
            )
            with closing(log):
                run.write_recipe(to_toml(plan.raw_recipe(arm, seed)))
                outcome = Trainer(recipe, run, log, base=Path("/"), origin=recipe.name).run()
        if outcome.model is None:
            raise Stopped
        held_out = measure(
            outcome.model, recipe, most_windows=plan.size.held_out_windows, progress=progress
        )
        result = {"identity": identity(recipe, data)}
        result |= _training(read_log(run.log))
        result |= asdict(held_out) | {"loss": held_out.loss}
        result |= {"standard_error": held_out.standard_error}
        if also is not None:
            result |= also(outcome.model, recipe, progress)
        # As JSON reads it back, so that a fresh result and one from its file are the same.
        text = json.dumps(result, allow_nan=False, indent=1)
        replace_file(folder / RESULT, text.encode() + b"\n")
        shutil.rmtree(run.checkpoints)
    return json.loads(text)


def _training(history: RunHistory) -> dict[str, Any]:
    """What the log says about speed, the way of the loss, and the balance at the end."""
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


def model_folder(out: Path, arm: str, seed: int) -> Path:
    """The trained model of a finished run."""
    return out / arm / f"seed-{seed}" / MODEL_FOLDER


@final
class _TaskView(ProgressView):
    """A run as one task among those of the study."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def start(self, record: StartRecord) -> None:
        if record.step:
            self._task.advance(record.step)

    def step(self, record: StepRecord) -> None:
        self._task.advance()

    def evaluation(self, record: EvalRecord) -> None:
        pass

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def status(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass
