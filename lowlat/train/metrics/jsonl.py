"""log.jsonl: one record per line, appended, and read back as the history of one training.

Owns the file. Lines are only ever added: a run that goes on from step s writes a start record with
step s, and readers leave out what an earlier run had written about later steps. A killed process
can leave one torn line at the end: readers leave it out, the next run cuts it off.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, final

from lowlat.train.metrics.lines import decode, encode
from lowlat.train.metrics.record import EvalRecord, NoteRecord, Record, StartRecord, StepRecord
from lowlat.utils.atomic_files import sync_descriptor
from lowlat.utils.errors import UserError

LOG_NAME = "log.jsonl"
"""The log's name in the folder of a run."""
_SYNC_SECONDS = 30.0
"""How much of the log a power cut may take."""
_BLOCK_BYTES = 2**16


@final
class LogWriter:
    """Appends records; each is one write, so a killed process loses none that was written."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file cannot be opened for writing.

        `cut_bytes` then holds the length of the torn line that was cut off, 0 for none.
        """
        self._path = path
        try:
            self._file: BinaryIO = open(path, "r+b" if path.exists() else "x+b", buffering=0)
        except OSError as error:
            raise self._failed(error) from error
        try:
            self.cut_bytes = _cut_torn_line(self._file)
        except OSError as error:
            self._file.close()
            raise self._failed(error) from error
        self._synced = time.monotonic()

    def write(self, record: Record) -> None:
        """Raises UserError where the file system refuses, such as a full disk."""
        line = memoryview(encode(record))
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise self._failed(error) from error
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """What was written reaches the disk. Raises UserError as `write` does."""
        try:
            sync_descriptor(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error
        self._synced = time.monotonic()

    def close(self) -> None:
        """Further calls do nothing."""
        self._file.close()

    def _failed(self, error: OSError) -> UserError:
        return UserError(
            f"{self._path}: the log cannot be written ({error.strerror}); make it writable or free "
            "space and start again, which goes on from the last save"
        )


def _cut_torn_line(file: BinaryIO) -> int:
    """Shorten `file` to whole lines and stand at its end; how many bytes went."""
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
    """One training as its log tells it, without what was superseded by a later run."""

    path: Path
    """The log."""
    starts: list[StartRecord] = field(default_factory=list)
    """Every run of the folder, the last one last; at least one."""
    steps: list[StepRecord] = field(default_factory=list)
    """In order of steps."""
    evaluations: list[EvalRecord] = field(default_factory=list)
    """In order of steps; one for each step and split."""
    notes: list[NoteRecord] = field(default_factory=list)
    """In the order they were written, those of superseded steps included."""
    superseded: int = 0
    """Step records left out because a later run went on from before them."""
    torn: bool = False
    """The last line is incomplete: being written now, or left by a killed process."""

    @property
    def start(self) -> StartRecord:
        """The latest run."""
        return self.starts[-1]

    def add(self, record: Record) -> None:
        """Take the next record of the log."""
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
    """The history in `path`, of a run that is over or still going.

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
                remedy = "if this is no log of a training, name the folder of one"
            raise UserError(f"{error}; {remedy}") from error
        if not history.starts and not isinstance(record, StartRecord | NoteRecord):
            raise UserError(f"{path}: line {number}: a log begins with a start record")
        history.add(record)
    if not history.starts:
        raise UserError(f"{path}: the log is empty; the run has not begun to train")
    return history


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such log; name the folder of a training run") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
