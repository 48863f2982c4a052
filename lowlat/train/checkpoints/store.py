"""Checkpoint store of a run: asynchronous writes, retention, and recovery after a crash.

Failures:

- A checkpoint that cannot be written does not affect earlier ones and does not stop training:
  `write_async` reports it in one line, and the next checkpoint is written as usual. `close` raises
  only if the last checkpoint of the run failed, because the final state is then not on disk.
- A crash loses the steps since the last complete checkpoint: at most one interval, plus the steps
  since the current write began. The next checkpoint waits for that write.
- A corrupt checkpoint is moved aside, never deleted; the run uses the one before it and reports
  that in one line. If no checkpoint is complete, nothing is moved and the run does not start over.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, final

from lowlat.checkpoint.safetensors.writer import NamedTensor
from lowlat.train.checkpoints import writer
from lowlat.train.checkpoints.checkpoint import TrainingCheckpoint, folder_name, step_of
from lowlat.train.checkpoints.errors import (
    CheckpointWriteError,
    CorruptCheckpointError,
    using,
    writing,
)
from lowlat.train.checkpoints.manifest import read_manifest
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.utils.atomic_files import rename_folder
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

_ASIDE = re.compile(r"step-[0-9]+\.broken(-[0-9]+)?")


@final
class CheckpointStore:
    """Checkpoints in the folder of `run`; all methods and `report` run in one thread."""

    def __init__(
        self,
        run: RunFolder,
        *,
        report: Callable[[str], None],
        keep_last: int = 2,
        keep_every: timedelta | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """If this process has the lock of `run`, remove unfinished files of killed processes.

        report: takes one line about a checkpoint that failed, is corrupt, or cannot be removed.
        keep_last: number of newest checkpoints to retain, one more during a write; at least 2, as
        one must remain if another is found corrupt.
        keep_every: also retain one checkpoint per this time.
        clock: seconds since 1970. Raises UserError for an unusable folder.
        """
        assert keep_last >= 2
        self.folder = run.checkpoints
        self._run = run
        self._report = report
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._pending_reports: list[str] = []
        self._failure: CheckpointWriteError | None = None
        if run.held:
            with using(self.folder):
                writer.clear_leftovers(self.folder, writer.DELETING, writer.WRITING)

    # Writing

    def write(self, step: int, tensors: Iterable[NamedTensor], metadata: Mapping[str, Any]) -> Path:
        """Write a checkpoint and return its folder once it is complete and durable.

        It references the tensors until then, so pass views, not copies. Raises
        CheckpointWriteError; earlier checkpoints are unchanged then.
        """
        self.wait()
        self._write(step, list(tensors), writer.encode_metadata(metadata))
        self._flush_reports()
        return self.folder / folder_name(step)

    def write_async(
        self, step: int, tensors: Iterable[NamedTensor], metadata: Mapping[str, Any]
    ) -> None:
        """Async checkpoint: `write` on a background thread; the tensors must not change any more.

        Waits for the previous write, reports its failure, if any, and starts this write anyway.
        """
        self.wait()
        encoded = writer.encode_metadata(metadata)
        self._failure = None
        self._pending = self._thread.submit(self._write, step, list(tensors), encoded)

    def poll(self) -> None:
        """Report the result of a background write if it is done; does not wait."""
        if self._pending is None or self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the background write and report a failure."""
        error = None if self._pending is None else self._pending.exception()
        self._pending = None
        self._flush_reports()
        if isinstance(error, CheckpointWriteError):
            self._failure = error
            self._report(f"{error}; training continues and the next checkpoint is tried as usual")
        elif error is not None:
            raise error

    def close(self) -> None:
        """Wait for the background write. Raises CheckpointWriteError if the last one failed."""
        self.wait()
        if self._failure is not None:
            raise self._failure

    # Reading

    def steps(self) -> list[int]:
        """Steps of all checkpoints, complete or not, in order. Raises UserError if unreadable."""
        with using(self.folder):
            return self._steps()

    def open(self, step: int) -> TrainingCheckpoint:
        """The checkpoint of `step`, taken as verified: another process got it from `latest`."""
        return TrainingCheckpoint(self.folder / folder_name(step), verify=False)

    def latest(self, progress: Progress | None = None) -> TrainingCheckpoint | None:
        """The newest complete checkpoint, with all checksums verified; None without checkpoints.

        Reports corrupt checkpoints and, if this process has the lock, moves them aside. Raises
        UserError if there are checkpoints but none is complete.
        """
        self.wait()
        corrupt: list[tuple[Path, str]] = []
        for step in reversed(self.steps()):
            folder = self.folder / folder_name(step)
            try:
                checkpoint = TrainingCheckpoint(folder, progress=progress)
            except CorruptCheckpointError as error:
                if folder.exists():  # else a running process removed it meanwhile
                    corrupt.append((folder, str(error)))
                continue
            for other, problem in corrupt:
                self._skip_corrupt(other, problem, checkpoint)
            return checkpoint
        if corrupt:
            raise UserError(
                f"{self.folder}: no checkpoint is complete ({_list(corrupt)}); restore one from a "
                "copy, or name a new folder to start over"
            )
        with using(self.folder):
            aside = sorted(name for name in self._names() if _ASIDE.fullmatch(name))
        if aside:  # a run must not start over
            raise UserError(
                f"{self.folder}: has only corrupt checkpoints ({', '.join(aside[:3])}); restore "
                "one from a copy, or name a new folder to start over"
            )
        return None

    def _skip_corrupt(self, folder: Path, problem: str, instead: TrainingCheckpoint) -> None:
        line = f"{folder}: {problem}; {instead.folder.name} is used instead"
        if self._run.held:
            aside = _unused(folder.with_name(f"{folder.name}.broken"))
            with using(folder):
                rename_folder(folder, aside)
            line += f", this one is renamed to {aside.name}"
        self._report(line)

    # Inside

    def _names(self) -> list[str]:
        return sorted(os.listdir(self.folder)) if self.folder.is_dir() else []

    def _steps(self) -> list[int]:
        return sorted(step for name in self._names() if (step := step_of(name)) is not None)

    def _write(self, step: int, tensors: Sequence[NamedTensor], metadata: bytes) -> None:
        assert self._run.held
        try:
            with writing(f"checkpoint of step {step}", self.folder):
                now = self._clock()
                writer.write_training_checkpoint(self.folder, step, tensors, metadata, now)
        except CheckpointWriteError as error:
            raise CheckpointWriteError(f"{error}; {self._newest_in_words()}") from error
        self._prune(step)

    def _newest_in_words(self) -> str:
        try:
            steps = self._steps()
        except OSError:  # the failure being reported comes first
            return "earlier checkpoints are unchanged"
        return f"the newest is that of step {steps[-1]}" if steps else "there is none yet"

    def _prune(self, step: int) -> None:
        """Apply the retention rule after the checkpoint of `step` is on disk.

        A failure does not fail the checkpoint; it is reported, and retried after the next one.
        """
        try:
            writer.clear_leftovers(self.folder, writer.DELETING)
            times = self._times()
            keep = steps_to_keep(times, last=self._keep_last, every=self._keep_every)
            for old in sorted(times.keys() - keep - {step}):
                writer.delete_training_checkpoint(self.folder, old)
        except OSError as error:
            self._pending_reports.append(
                f"{self.folder}: an old checkpoint cannot be removed ({error.strerror}); "
                "it is tried again after the next one"
            )

    def _times(self) -> dict[int, float]:
        """Write time of each checkpoint, without visibly corrupt ones, which are never pruned."""
        times: dict[int, float] = {}
        for step in self._steps():
            try:
                times[step] = read_manifest(self.folder / folder_name(step)).time
            except UserError:  # `latest` reports it and moves it aside
                continue
        return times

    def _flush_reports(self) -> None:
        while self._pending_reports:
            self._report(self._pending_reports.pop(0))


def _unused(path: Path) -> Path:
    """`path`, with a number appended if it exists."""
    number, candidate = 1, path
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _list(corrupt: Sequence[tuple[Path, str]]) -> str:
    shown = [f"{folder.name}: {problem}" for folder, problem in corrupt[:3]]
    return "; ".join(shown + ["..."] * (len(corrupt) > 3))


def steps_to_keep(times: Mapping[int, float], *, last: int, every: timedelta | None) -> set[int]:
    """Steps of the checkpoints to retain.

    times: write time of each step's checkpoint, in seconds. The `last` newest steps are retained.
    With `every`, the oldest is retained as well, then each first one written at least `every` after
    the previous retained one. Removing the others does not change the result.
    """
    steps = sorted(times)
    keep = set(steps[-last:])
    if every is None:
        return keep
    previous: float | None = None
    for step in steps:
        if previous is None or times[step] - previous >= every.total_seconds():
            keep.add(step)
            previous = times[step]
    return keep
