"""A whole save, opened: its facts and its tensors, mapped from the files.

Owns what makes a save whole. Which save is opened is `saves`' choice.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor

from lowlat.checkpoint.safetensors.reader import SafetensorsFile
from lowlat.train.checkpoints.errors import BrokenSaveError, reading
from lowlat.train.checkpoints.manifest import Manifest, check_digest, read_manifest
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, SilentProgress
from lowlat.utils.strict_json import MAX_JSON_BYTES, parse_object, quoted

FACTS_FILE = "facts.json"
PART_SUFFIX = ".safetensors"

_FOLDER_NAME = re.compile(r"step-([0-9]{8,18})")


def folder_name(step: int) -> str:
    """The name of a whole save's folder."""
    return f"step-{step:08}"


def step_of(name: str) -> int | None:
    """The step of a save's folder name; None for all other names."""
    match = _FOLDER_NAME.fullmatch(name)
    if match is None or folder_name(int(match[1])) != name:
        return None
    return int(match[1])


@final
class Save:
    """The state after `step` optimiser steps. Files stay mapped while a tensor of them lives."""

    def __init__(
        self, folder: Path, *, verify: bool = True, progress: Progress | None = None
    ) -> None:
        """Open and check the save in `folder`.

        verify: hash every file; without it only the manifest, names, sizes and headers are checked,
        for a process that opens what another one has verified.
        Raises BrokenSaveError if it is not whole, UserError if it cannot be read or is of another
        format.
        """
        self.folder = folder
        self._manifest = read_manifest(folder)
        if self._manifest.step != step_of(folder.name):
            raise BrokenSaveError(f"its manifest is that of step {self._manifest.step}")
        if verify:
            _check_files(folder, self._manifest, progress or SilentProgress())
        self.facts: Mapping[str, Any] = _read_facts(folder, self._manifest)
        """What was saved beside tensors."""
        self._files: Mapping[str, SafetensorsFile] = open_parts(folder, self._manifest.files)

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self._manifest.step

    @property
    def time(self) -> float:
        """When it was written, in seconds since 1970."""
        return self._manifest.time

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._files)

    def tensor(self, name: str) -> Tensor:
        """A tensor as a view of its file: writing to it changes a private copy.

        Raises UserError if the save has none of that name.
        """
        if name not in self._files:
            raise UserError(
                f"{self.folder}: has no tensor {quoted(name)}; it was written for another model or "
                "optimiser"
            )
        return self._files[name].read(name)

    def release(self, name: str) -> None:
        """Drop a tensor's pages from memory; what was written to it in place is lost."""
        self._files[name].release(name)


def _check_files(folder: Path, manifest: Manifest, progress: Progress) -> None:
    total = sum(record.size for record in manifest.files.values())
    with progress.task(f"checking {folder.name}", total, "bytes") as task:
        for name, record in sorted(manifest.files.items()):
            check_digest(folder / name, record, task)


def _read_facts(folder: Path, manifest: Manifest) -> dict[str, Any]:
    if FACTS_FILE not in manifest.files:
        raise BrokenSaveError(f"{FACTS_FILE} is missing")
    with reading(folder), (folder / FACTS_FILE).open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    try:
        return parse_object(data, FACTS_FILE)
    except UserError as error:
        raise BrokenSaveError(str(error)) from error


def open_parts(folder: Path, names: Iterable[str]) -> dict[str, SafetensorsFile]:
    """The file of every tensor in the parts among `names`.

    Raises BrokenSaveError for a file that is no part, is damaged, or repeats a tensor.
    """
    files: dict[str, SafetensorsFile] = {}
    for name in sorted(names):
        if name == FACTS_FILE:
            continue
        if not name.endswith(PART_SUFFIX):
            raise BrokenSaveError(f"{quoted(name)} is no part of a save")
        file = _open_part(folder / name)
        for tensor in file.extents:
            if tensor in files:
                raise BrokenSaveError(f"tensor {quoted(tensor)} is in two parts")
            files[tensor] = file
    return files


def _open_part(path: Path) -> SafetensorsFile:
    with reading(path):  # what the system refuses for the moment does not make it broken
        try:
            return SafetensorsFile(path)
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise BrokenSaveError(str(error)) from error
