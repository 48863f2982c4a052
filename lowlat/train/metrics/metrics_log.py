"""The one object a trainer tells what happens: log.jsonl, TensorBoard files and the view.

Owns who gets which record. Only one process of a run has a log; the others hold SilentMetricsLog.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import final

from lowlat.train.metrics import tensorboard
from lowlat.train.metrics.jsonl import LogWriter
from lowlat.train.metrics.progress_view import ProgressView
from lowlat.train.metrics.record import EvalRecord, NoteRecord, StartRecord, StepRecord

LOADS_EVERY = 10
"""Least steps between two records in the log that hold the load of every expert. The others have
what is derived from it, so that the log of a large model stays small.
"""

Fact = str | int | float | bool | None


class MetricsLog(ABC):
    """Takes the records of one run in the order they come."""

    @abstractmethod
    def start(
        self,
        *,
        name: str,
        step: int,
        total_steps: int,
        tokens_total: int,
        facts: Mapping[str, Fact],
    ) -> None:
        """The run begins, or goes on from the save of `step`; comes first, notes aside.

        Args:
            name: the recipe's name.
            step: optimiser steps done: 0, or those of the save. Records of later steps that a
                dead run left are superseded; that of `step` itself is kept, so a step is to be
                recorded before it is saved.
            total_steps: optimiser steps of the whole recipe.
            tokens_total: input tokens of the whole recipe.
            facts: what else to keep, such as parameters, device, threads; shown at the start.
        """

    @abstractmethod
    def step(self, record: StepRecord) -> None:
        """A step is done."""

    @abstractmethod
    def evaluation(self, record: EvalRecord) -> None:
        """An evaluation is done; a second one of the same step and split replaces the first."""

    @abstractmethod
    def note(self, text: str) -> None:
        """One line worth keeping, such as a save that was skipped; shown at once."""

    @abstractmethod
    def status(self, text: str) -> None:
        """What goes on between two steps, such as 'evaluating', for a live view; '': nothing."""

    @abstractmethod
    def close(self) -> None:
        """The run is over, done or not; to be called however it ends. Again: does nothing."""


@final
class SilentMetricsLog(MetricsLog):
    """Keeps nothing: for the other processes of a run, and for tests."""

    def start(
        self,
        *,
        name: str,
        step: int,
        total_steps: int,
        tokens_total: int,
        facts: Mapping[str, Fact],
    ) -> None:
        pass

    def step(self, record: StepRecord) -> None:
        pass

    def evaluation(self, record: EvalRecord) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def status(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


@final
class FolderMetricsLog(MetricsLog):
    """Writes to the folder of a run and shows it."""

    def __init__(
        self,
        *,
        log: Path,
        tensorboard_folder: Path,
        view: ProgressView,
        tensorboard_wanted: bool | None = None,
        loads_every: int = LOADS_EVERY,
    ) -> None:
        """Opens the log, which is made where it is not there yet.

        Args:
            log: log.jsonl of the run; its folder exists.
            tensorboard_folder: where TensorBoard files go.
            view: who watches.
            tensorboard_wanted: None writes TensorBoard files where tensorboard is installed and
                notes where it is not; True insists; False leaves them out.
            loads_every: least steps between two records in the log with the load of every expert.

        Raises:
            UserError: the log cannot be written, or tensorboard is wanted and not installed.
        """
        if tensorboard_wanted:
            tensorboard.require()
        self._view = view
        self._tensorboard_folder = tensorboard_folder
        self._tensorboard_wanted = tensorboard_wanted
        self._tensorboard: tensorboard.TensorBoardFiles | None = None
        self._loads_every = loads_every
        self._step = 0
        self._loads_due = 0
        self._log = LogWriter(log)

    def start(
        self,
        *,
        name: str,
        step: int,
        total_steps: int,
        tokens_total: int,
        facts: Mapping[str, Fact],
    ) -> None:
        record = StartRecord(
            step=step,
            name=name,
            total_steps=total_steps,
            tokens_total=tokens_total,
            facts=dict(facts),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._step = step
        self._log.write(record)
        if self._log.cut_bytes:
            self.note(
                f"log: cut off a torn last line of {self._log.cut_bytes:,} bytes, left by a run "
                "that was killed"
            )
        if self._tensorboard_wanted is not False:
            self._open_tensorboard(record)
        self._view.start(record)

    def step(self, record: StepRecord) -> None:
        self._step = record.step
        due = record.step >= self._loads_due
        if due:
            self._loads_due = record.step + self._loads_every
        self._log.write(record if due else _without_loads(record))
        if self._tensorboard is not None:
            self._tensorboard.step(record)
        self._view.step(record)

    def evaluation(self, record: EvalRecord) -> None:
        self._log.write(record)
        if self._tensorboard is not None:
            self._tensorboard.evaluation(record)
        self._view.evaluation(record)

    def note(self, text: str) -> None:
        text = " ".join(text.split())
        self._view.note(text)
        self._log.write(NoteRecord(step=self._step, text=text))

    def status(self, text: str) -> None:
        self._view.status(text)

    def close(self) -> None:
        self._view.close()
        try:
            if self._tensorboard is not None:
                self._tensorboard.close()
        finally:
            self._log.close()

    def _open_tensorboard(self, record: StartRecord) -> None:
        if self._tensorboard_wanted or tensorboard.available():
            self._tensorboard = tensorboard.TensorBoardFiles(self._tensorboard_folder, record)
        else:
            self.note("no TensorBoard files: tensorboard is not installed (lowlat[train])")


def _without_loads(record: StepRecord) -> StepRecord:
    return replace(record, experts=tuple(replace(layer, load=()) for layer in record.experts))
