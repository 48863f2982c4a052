"""Runs of a study, each in a folder of its own: finished ones are read, missing ones are run, a
failure does not stop the others. Several processes may share the work.

    FOLDER/lock         locked while a process runs there
    FOLDER/result.json  present once the run is finished
"""

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lowlat.train.metrics.metrics_log import MetricsLog
from lowlat.train.metrics.record import EvalRecord, StartRecord, StepRecord
from lowlat.utils.atomic_files import replace_file
from lowlat.utils.errors import UserError
from lowlat.utils.file_lock import try_lock
from lowlat.utils.progress import Progress, Task
from lowlat.utils.strict_json import parse_object

RESULT = "result.json"

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRun:
    """A run that may be finished."""

    variant: str
    seed: int
    folder: Path
    identity: dict[str, Any]
    """Its settings, as JSON values; stored in the result."""
    run: Callable[[Progress], Result]
    """Runs it in its folder, or resumes; returns what `write_result` returns."""


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


def run_missing(
    title: str, runs: Sequence[StudyRun], limit: int | None, progress: Progress
) -> list[RunResult]:
    """The results of `runs`, of which up to `limit` missing ones are run; None: all.

    Raises UserError before anything is run if a folder holds a run with other settings; Stopped on
    SIGINT or SIGTERM.
    """
    for each in runs:
        read_result(each)
    left = len(runs) if limit is None else limit
    found = []
    with progress.task(title, len(runs)) as task:
        for each in runs:
            # read again: another process may have finished it meanwhile
            result = read_result(each)
            if result is not None:
                found.append(RunResult(variant=each.variant, seed=each.seed, result=result))
            elif left > 0 and not _is_locked(each.folder):
                found.append(_attempt(each, progress))
                left -= 1
            task.advance()
    return found


def read_result(run: StudyRun) -> Result | None:
    """The result in a run's folder; None if it is not finished.

    Raises UserError, listing the differences, if it was run with other settings.
    """
    file = run.folder / RESULT
    if not file.is_file():
        return None
    result = parse_object(file.read_bytes(), str(file))
    differences = _differences(result.get("identity"), run.identity)
    if differences:
        raise UserError(
            f"{run.folder}: holds a run of another study: {'; '.join(differences[:3])}; "
            "name another --out or give the options it was run with"
        )
    return result


def write_result(folder: Path, identity: dict[str, Any], figures: Result) -> Result:
    """Write result.json, before the run's lock is released; returns its contents."""
    result = {"identity": identity} | figures
    # read back from JSON, so that fresh and stored results are equal
    text = json.dumps(result, allow_nan=False, separators=(",", ":"))
    replace_file(folder / RESULT, text.encode() + b"\n")
    return json.loads(text)


def _is_locked(folder: Path) -> bool:
    """Whether a process runs in `folder`."""
    lock = folder / "lock"
    if not lock.exists():
        return False
    with lock.open("rb") as file:
        return not try_lock(file.fileno())


def _attempt(run: StudyRun, progress: Progress) -> RunResult:
    try:
        return RunResult(variant=run.variant, seed=run.seed, result=run.run(progress))
    except UserError as error:
        failure = str(error)
    # one failure must not lose hours of other runs; the report lists it
    except Exception as error:
        traceback.print_exc()
        failure = f"{type(error).__name__}: {error}"
    print(f"{run.variant}, seed {run.seed}: failed: {failure}", file=sys.stderr)
    first = failure.splitlines()[0]
    return RunResult(variant=run.variant, seed=run.seed, result=None, failure=first)


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


@final
class TaskView(MetricsLog):
    """Progress of a training as one task of the study."""

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
