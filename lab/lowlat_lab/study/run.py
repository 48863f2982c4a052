"""Study runner: trains every variant with every seed, each in its own folder; resumable.

    OUT/VARIANT/seed-N/             run folder of `lowlat train`
    OUT/VARIANT/seed-N/result.json  present once the run is trained and measured

A failed run does not stop the others. Several processes may share the work: each skips runs that
another trains.
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
from lowlat.train.metrics.metrics_log import FolderMetricsLog, MetricsLog
from lowlat.train.metrics.record import EvalRecord, StartRecord, StepRecord
from lowlat.train.recipe.schema import Recipe
from lowlat.train.recipe.toml import to_toml
from lowlat.train.run.trainer import MODEL_FOLDER, Trainer
from lowlat.utils.atomic_files import replace_file
from lowlat.utils.errors import UserError
from lowlat.utils.file_lock import try_lock
from lowlat.utils.progress import Progress, Task
from lowlat.utils.strict_json import parse_object
from lowlat_lab.study.measure import measure
from lowlat_lab.study.plan import StudyPlan, Variant

RESULT = "result.json"
LAST_PART = 20
"""Final expert load is the mean over the last twentieth of the steps."""

Result = dict[str, Any]
Measure = Callable[[Path, Recipe, Progress], dict[str, Any]]
"""Measures the model in a folder, trained by a recipe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """Result of one run."""

    variant: str
    seed: int
    result: Result | None
    """Contents of result.json; None if the run failed."""
    failure: str | None = None
    """Error message in one line; None for a finished run."""


class Stopped(KeyboardInterrupt):
    """The study was stopped by a signal; finished runs are kept."""


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

    also: an additional measurement of every trained model. Raises UserError before any training
    if `out` holds runs with other settings; Stopped on SIGINT or SIGTERM.
    """

    def result_of(variant: Variant, seed: int) -> Result | None:
        return read_result(run_folder(out, variant, seed), plan.recipe(variant, seed), data)

    for variant, seed in plan.runs:
        result_of(variant, seed)
    left = len(plan.runs) if plan.limit is None else plan.limit
    found = []
    with progress.task(f"{plan.kind} study", len(plan.runs)) as task:
        for variant, seed in plan.runs:
            # read again: another process may have finished it meanwhile
            result = result_of(variant, seed)
            if result is not None:
                found.append(RunResult(variant=variant.name, seed=seed, result=result))
            elif left > 0 and not _is_locked(run_folder(out, variant, seed)):
                found.append(_attempt(plan, variant, seed, data, out, progress, also))
                left -= 1
            task.advance()
    return found


def _is_locked(folder: Path) -> bool:
    """Whether a process trains in `folder`."""
    lock = folder / "lock"
    if not lock.exists():
        return False
    with lock.open("rb") as file:
        return not try_lock(file.fileno())


def read_result(folder: Path, recipe: Recipe, data: TokenizedDataset) -> Result | None:
    """The result in a run folder; None if the run is not finished.

    Raises UserError, listing the differences, if it was run with another recipe or data.
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
    """Identity of a run: recipe and data fingerprint."""
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
    plan: StudyPlan,
    variant: Variant,
    seed: int,
    data: TokenizedDataset,
    out: Path,
    progress: Progress,
    also: Measure | None,
) -> RunResult:
    folder = run_folder(out, variant, seed)
    try:
        return RunResult(
            variant=variant.name,
            seed=seed,
            result=_run(plan, variant, seed, data, folder, progress, also),
        )
    except UserError as error:
        failure = str(error)
    # one failure must not lose hours of other runs; the report lists it
    except Exception as error:
        traceback.print_exc()
        failure = f"{type(error).__name__}: {error}"
    print(f"{variant.name}, seed {seed}: failed: {failure}", file=sys.stderr)
    return RunResult(variant=variant.name, seed=seed, result=None, failure=failure.splitlines()[0])


def _run(
    plan: StudyPlan,
    variant: Variant,
    seed: int,
    data: TokenizedDataset,
    folder: Path,
    progress: Progress,
    also: Measure | None,
) -> Result:
    """Train, measure, write the result, and remove the training checkpoints."""
    recipe = plan.recipe(variant, seed)
    with RunFolder(folder) as run:
        with progress.task(f"{variant.name}, seed {seed}", plan.steps) as task:
            log = FolderMetricsLog(run, view=_TaskView(task), tensorboard_wanted=False)
            with closing(log):
                run.write_recipe(to_toml(plan.raw_recipe(variant, seed)))
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
        result["window_losses"] = [round(loss, 6) for loss in held_out.window_losses]
        if also is not None:
            result |= also(outcome.model, recipe, progress)
        # read back from JSON, so that fresh and stored results are equal
        text = json.dumps(result, allow_nan=False, separators=(",", ":"))
        replace_file(folder / RESULT, text.encode() + b"\n")
        shutil.rmtree(run.checkpoints)
    return json.loads(text)


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


@final
class _TaskView(MetricsLog):
    """Progress of a run as one task of the study."""

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
