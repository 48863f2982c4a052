"""The saves of a run: written while training goes on, found again after any death.

Owns which saves exist, which are kept, which one a run resumes from, and what a failure means:

- A save that cannot be written never harms an earlier one, and never stops training: `write_later`
  reports it in one line, and the next save is tried as if nothing had been. Only when the last save
  of all failed does `close` raise, since the end of the run is then on no disk.
- A death loses the steps since the last whole save: one interval at most and, while a save is being
  written, the steps since that one began. The next save waits for it, so there are never three.
- A save that is not what was written is moved aside, never deleted, and the one before is used,
  in one line. If none is whole, nothing is moved and the run does not begin from the start.
"""

import functools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, final

from lowlat.train.checkpoints import writer
from lowlat.train.checkpoints.background import Background
from lowlat.train.checkpoints.checkpoint import Save, folder_name, step_of
from lowlat.train.checkpoints.errors import BrokenSaveError, SaveError, using, writing
from lowlat.train.checkpoints.manifest import read_manifest
from lowlat.train.checkpoints.part import NamedTensor
from lowlat.train.checkpoints.retention import kept
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.utils.atomic_files import rename_folder
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

Parts = Mapping[str, Iterable[NamedTensor]]
"""Tensors by the name of the part (file) they go into; a tensor's name is unique in all of them."""

LEAST_KEPT = 2

_ASIDE = re.compile(r"step-[0-9]+\.broken(-[0-9]+)?")


@final
class Saves:
    """Saves in `run`. Methods are called from one thread, and `report` in that thread only."""

    def __init__(
        self,
        run: RunFolder,
        *,
        report: Callable[[str], None],
        keep_last: int = LEAST_KEPT,
        keep_every: timedelta | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Where `run` is held, what dead processes left unfinished is removed.

        report: takes one line about a failed save, a broken one, one that could not be removed.
        keep_last: how many saves stay, at least 2; while one is written there is one more.
        keep_every: beyond those, one save of each such time stays for good.
        clock: seconds since 1970. Raises UserError for bad values and an unusable folder.
        """
        if keep_last < LEAST_KEPT:
            raise UserError(f"keep_last {keep_last} must be at least {LEAST_KEPT}")
        if keep_every is not None and keep_every <= timedelta(0):
            raise UserError(f"keep_every {keep_every} must be more than no time")
        self.folder = run.saves
        self._run = run
        self._report = report
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._clock = clock
        self._work = Background()
        self._notes: list[str] = []
        self._failure: SaveError | None = None
        if run.held:
            with using(self.folder):
                writer.clear_deleted(self.folder)
                writer.clear_unfinished(self.folder)

    # Writing

    def write(self, step: int, parts: Parts, facts: Mapping[str, Any]) -> Path:
        """Write a save and return its folder once it is whole and on the disk.

        Tensors are held until then: give views, not copies. Raises SaveError if it fails; then
        everything else is as it was.
        """
        self.wait()
        self._write(step, _listed(parts), writer.encode_facts(facts))
        self._tell()
        return self.folder / folder_name(step)

    def write_later(self, step: int, parts: Parts, facts: Mapping[str, Any]) -> None:
        """The same on a thread, for tensors that nobody changes any more.

        Waits for the write before, if it goes on; reports its failure, if any, and begins this one
        all the same.
        """
        self.wait()
        work = functools.partial(self._write, step, _listed(parts), writer.encode_facts(facts))
        self._failure = None
        self._work.start(work, f"save of step {step}")

    def poll(self) -> None:
        """Report what a write on the thread left to say, if it is done; never waits."""
        if not self._work.busy:
            self.wait()

    def wait(self) -> None:
        """Wait for the write on the thread, and report if it failed."""
        error = self._work.outcome()
        self._tell()
        if isinstance(error, SaveError):
            self._failure = error
            self._report(f"{error}; training goes on and the next save is tried as usual")
        elif error is not None:
            raise error

    def close(self) -> None:
        """Wait for the write on the thread. Raises SaveError if the last one failed."""
        self.wait()
        if self._failure is not None:
            raise self._failure

    def write_part(self, step: int, part: str, tensors: Iterable[NamedTensor]) -> None:
        """Write one part of a save that several processes write. Raises SaveError."""
        with writing(f"part {part} of the save of step {step}", self.folder):
            writer.write_one_part(self.folder, step, part, list(tensors))

    def commit(self, step: int, parts: Sequence[str], facts: Mapping[str, Any]) -> Path:
        """Make a save of parts that other processes, or this one, have all written by now.

        Raises SaveError if one is missing or not what its writer recorded, or it fails otherwise.
        """
        assert self._run.held
        self.wait()
        with self._attempt(step):
            now = self._clock()
            writer.commit_save(self.folder, step, parts, writer.encode_facts(facts), now)
        self._prune(step)
        self._tell()
        return self.folder / folder_name(step)

    # Reading

    def steps(self) -> list[int]:
        """The steps of all saves, whole or not, oldest first. Raises UserError if unreadable."""
        with using(self.folder):
            return self._steps()

    def open(self, step: int) -> Save:
        """The save of `step`, taken as verified: for what another process got from `latest`."""
        return Save(self.folder / folder_name(step), verify=False)

    def latest(self, progress: Progress | None = None) -> Save | None:
        """The newest whole save, every byte of it verified; None if nothing was saved yet.

        Broken ones are reported and, where the run is held, moved aside. Raises UserError if there
        are saves but none is whole.
        """
        self.wait()
        broken: list[tuple[Path, str]] = []
        for step in reversed(self.steps()):
            folder = self.folder / folder_name(step)
            try:
                save = Save(folder, progress=progress)
            except BrokenSaveError as error:
                if folder.exists():  # else a running process removed it meanwhile
                    broken.append((folder, str(error)))
                continue
            for other, fault in broken:
                self._pass_over(other, fault, save)
            return save
        if broken:
            raise UserError(
                f"{self.folder}: no save is whole ({_list(broken)}); restore one from a copy, or "
                "name a new folder to begin from the start"
            )
        self._refuse_all_broken()
        return None

    def _pass_over(self, folder: Path, fault: str, instead: Save) -> None:
        line = f"{folder}: {fault}; {instead.folder.name} is used instead"
        if self._run.held:
            aside = _unused(folder.with_name(f"{folder.name}.broken"))
            with using(folder):
                rename_folder(folder, aside)
            line += f", this one is kept as {aside.name}"
        self._report(line)

    def _refuse_all_broken(self) -> None:
        """Saves that were moved aside are still a reason not to begin from the start."""
        with using(self.folder):
            aside = sorted(name for name in self._names() if _ASIDE.fullmatch(name))
        if aside:
            raise UserError(
                f"{self.folder}: holds only broken saves ({', '.join(aside[:3])}); restore one from"
                " a copy, or name a new folder to begin from the start"
            )

    # Inside

    def _names(self) -> list[str]:
        return sorted(os.listdir(self.folder)) if self.folder.is_dir() else []

    def _steps(self) -> list[int]:
        return sorted(step for name in self._names() if (step := step_of(name)) is not None)

    def _write(self, step: int, parts: Mapping[str, Sequence[NamedTensor]], facts: bytes) -> None:
        assert self._run.held
        with self._attempt(step):
            writer.write_save(self.folder, step, parts, facts, self._clock())
        self._prune(step)

    @contextmanager
    def _attempt(self, step: int) -> Iterator[None]:
        """Says with every failure what the run falls back on."""
        try:
            with writing(f"save of step {step}", self.folder):
                yield
        except SaveError as error:
            raise SaveError(f"{error}; {self._standing()}") from error

    def _standing(self) -> str:
        try:
            steps = self._steps()
        except OSError:  # the failure that is being told comes first
            return "the saves before it are as they were"
        return f"the newest save is that of step {steps[-1]}" if steps else "nothing is saved yet"

    def _prune(self, step: int) -> None:
        """Remove the saves that are not to be kept, now that the one of `step` is on the disk.

        A failure is no failure of the save: it is reported, and tried again after the next one.
        """
        try:
            writer.clear_deleted(self.folder)
            times = self._times()
            keep = kept(times, last=self._keep_last, every=self._keep_every)
            for old in sorted(times.keys() - keep - {step}):
                writer.delete_save(self.folder, old)
        except OSError as error:
            self._notes.append(
                f"{self.folder}: an old save cannot be removed ({error.strerror}); "
                "it is tried again after the next save"
            )

    def _times(self) -> dict[int, float]:
        """When each save was written. One that is visibly broken counts for nothing and stays."""
        times: dict[int, float] = {}
        for step in self._steps():
            try:
                times[step] = read_manifest(self.folder / folder_name(step)).time
            except UserError:  # told and moved aside by `latest`
                continue
        return times

    def _tell(self) -> None:
        while self._notes:
            self._report(self._notes.pop(0))


def _listed(parts: Parts) -> dict[str, list[NamedTensor]]:
    return {part: list(tensors) for part, tensors in parts.items()}


def _unused(path: Path) -> Path:
    """`path`, or with a number after it where that is taken."""
    number, candidate = 1, path
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _list(broken: Sequence[tuple[Path, str]]) -> str:
    shown = [f"{folder.name}: {fault}" for folder, fault in broken[:3]]
    return "; ".join(shown + ["..."] * (len(broken) > 3))
