"""Metrics logging of a run: the interface of logs and views, and the log of a run folder, which
passes records to log.jsonl, TensorBoard and a progress view.

Only rank 0 writes a log; other processes have a SilentMetricsLog.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import final

from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.metrics import tensorboard
from lowlat.train.metrics.jsonl import LogWriter
from lowlat.train.metrics.record import EvalRecord, NoteRecord, StartRecord, StepRecord
from lowlat.utils.errors import UserError

LOADS_EVERY = 10
"""Minimum steps between log records with the load of every expert. The other records have only
MaxVio, entropy and bias, so that the log of a large model stays small.
"""


class MetricsLog(ABC):
    """Interface: takes the records of one run, in order, in one thread."""

    @abstractmethod
    def start(self, record: StartRecord) -> None:
        """Log that a run starts or resumes; must precede all other records except notes.

        It supersedes older records of later steps than `record.step`, so a step must be recorded
        before its checkpoint is written.
        """

    @abstractmethod
    def step(self, record: StepRecord) -> None:
        """Log a step."""

    @abstractmethod
    def evaluation(self, record: EvalRecord) -> None:
        """Log an evaluation; it replaces an earlier one of the same step and split."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Log and show one line, such as a failed checkpoint."""

    @abstractmethod
    def status(self, text: str) -> None:
        """Show an activity between steps in a live view, such as 'evaluating'; '' clears it."""

    @abstractmethod
    def close(self) -> None:
        """Close all files; must be called however the run ends. Further calls do nothing."""


@final
class SilentMetricsLog(MetricsLog):
    """Discards all records: for processes other than rank 0, and as a quiet view."""

    def start(self, record: StartRecord) -> None:
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
    """Writes records to a run folder and shows them."""

    def __init__(
        self, run: RunFolder, *, view: MetricsLog, tensorboard_wanted: bool | None
    ) -> None:
        """Open or create the log in the existing folder of `run`; `view` shows the records.

        tensorboard_wanted: None writes TensorBoard files if tensorboard is installed and logs a
        note otherwise; True requires tensorboard; False writes none. Raises UserError if the log
        cannot be written, or tensorboard is required and not installed.
        """
        if tensorboard_wanted and not tensorboard.available():
            raise UserError(
                "the recipe asks for TensorBoard files, which need tensorboard: "
                "pip install lowlat[train], or leave the option out"
            )
        self._view = view
        self._run = run
        self._tensorboard_wanted = tensorboard_wanted
        self._tensorboard: tensorboard.TensorBoardFiles | None = None
        self._step = 0
        self._loads_due = 0
        self._log = LogWriter(run.log)

    def start(self, record: StartRecord) -> None:
        self._step = record.step
        self._log.write(record)
        if self._log.cut_bytes:
            self.note(
                f"log: removed a torn last line of {self._log.cut_bytes:,} bytes, left by a "
                "killed run"
            )
        if self._tensorboard_wanted is not False:
            self._open_tensorboard(record)
        self._view.start(record)

    def step(self, record: StepRecord) -> None:
        self._step = record.step
        logged = record
        if record.step >= self._loads_due:
            self._loads_due = record.step + LOADS_EVERY
        else:
            layers = tuple(replace(layer, load=()) for layer in record.experts)
            logged = replace(record, experts=layers)
        self._log.write(logged)
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
            self._tensorboard = tensorboard.TensorBoardFiles(self._run.tensorboard, record)
        else:
            self.note("no TensorBoard files: tensorboard is not installed (lowlat[train])")
