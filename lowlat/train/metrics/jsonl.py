"""Metrics log log.jsonl: an append-only file of records, and its reader.

A run that resumes from step s writes a start record with step s; readers drop earlier records of
later steps. A killed process can leave a torn last line, which readers skip and the next run
removes.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, final

from lowlat.train.metrics.lines import decode, encode
from lowlat.train.metrics.record import EvalRecord, NoteRecord, Record, StartRecord, StepRecord
from lowlat.utils.atomic_files import sync_descriptor
from lowlat.utils.errors import UserError

LOG_NAME = "log.jsonl"
"""Name of the log in a run folder."""
_SYNC_SECONDS = 30.0
"""Seconds between fsyncs: the part of the log that a power failure can lose."""
_BLOCK_BYTES = 2**16


@final
class LogWriter:
    """Appends records, each unbuffered, so a killed process loses no complete record."""

    def __init__(self, path: Path) -> None:
        """Open `path` and remove a torn last line, of `cut_bytes` bytes; 0 if there is none.

        Raises UserError if the file cannot be opened for writing.
        """
        self._path = path
        self._synced = time.monotonic()
        with self._failures():
            self._file: BinaryIO = open(path, "r+b" if path.exists() else "x+b", buffering=0)
            try:
                self.cut_bytes = _cut_torn_line(self._file)
            except OSError:
                self._file.close()
                raise

    def write(self, record: Record) -> None:
        """Append `record`. Raises UserError if writing fails, for example on a full disk."""
        line = memoryview(encode(record))
        with self._failures():
            while line:
                line = line[self._file.write(line) :]
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                sync_descriptor(self._file.fileno())
                self._synced = time.monotonic()

    def close(self) -> None:
        """Close the file; further calls do nothing."""
        self._file.close()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path}: the log cannot be written ({error.strerror}); make it writable or "
                "free space and start again to resume from the last checkpoint"
            ) from error


def _cut_torn_line(file: BinaryIO) -> int:
    """Truncate `file` to complete lines and seek to its end; returns the removed bytes."""
    size = file.seek(0, os.SEEK_END)
    end = size
    while end > 0:
        first = max(0, end - _BLOCK_BYTES)
        file.seek(first)
        place = file.read(end - first).rfind(b"\n")
        if place >= 0:
            end = first + place + 1
            break
        end = first
    file.truncate(end)
    file.seek(end)
    return size - end


@dataclass
class RunHistory:
    """Records of one training run, without those that a resumed run superseded."""

    path: Path
    """The log."""
    starts: list[StartRecord] = field(default_factory=list)
    """Start records, one per start or resumption, in order; at least one."""
    steps: list[StepRecord] = field(default_factory=list)
    """Step records, in order of steps."""
    evaluations: list[EvalRecord] = field(default_factory=list)
    """Evaluations, in order of steps; one per step and split."""
    notes: list[NoteRecord] = field(default_factory=list)
    """Notes, in the order written, those of superseded steps included."""
    superseded: int = 0
    """Number of step records that were superseded."""
    torn: bool = False
    """Whether the last line is incomplete: being written, or left by a killed process."""

    @property
    def start(self) -> StartRecord:
        """The latest start record."""
        return self.starts[-1]

    def add(self, record: Record) -> None:
        match record:
            case StartRecord():
                self.starts.append(record)
                kept = [step for step in self.steps if step.step <= record.step]
                self.superseded += len(self.steps) - len(kept)
                self.steps = kept
                self.evaluations = [e for e in self.evaluations if e.step <= record.step]
            case StepRecord():
                self.steps.append(record)
            case EvalRecord():
                known = (record.step, record.split)
                rest = [e for e in self.evaluations if (e.step, e.split) != known]
                self.evaluations = [*rest, record]
            case NoteRecord():
                self.notes.append(record)


def read_log(path: Path) -> RunHistory:
    """Read the log `path` of a finished or active run.

    Raises UserError for a file that is missing, unreadable, empty or damaged before its last line.
    """
    history = RunHistory(path)
    for number, line in enumerate(_lines(path), start=1):
        if not line.endswith(b"\n"):
            history.torn = True
            break
        try:
            record = decode(line, f"{path}: line {number}")
        except UserError as error:
            remedy = "delete that line to read the others"
            if number == 1:
                remedy = "if this is not a training log, name a run folder"
            raise UserError(f"{error}; {remedy}") from error
        if not history.starts and not isinstance(record, StartRecord | NoteRecord):
            raise UserError(f"{path}: line {number}: a log begins with a start record")
        history.add(record)
    if not history.starts:
        raise UserError(f"{path}: the log is empty; the run has not started training")
    return history


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such log; name the folder of a training run") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
