"""Reader of one training checkpoint: verification, metadata, and memory-mapped tensors."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor

from lowlat.checkpoint.safetensors.reader import SafetensorsFile
from lowlat.train.checkpoints.errors import CorruptCheckpointError, reading
from lowlat.train.checkpoints.manifest import Manifest, check_digest, read_manifest
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, SilentProgress
from lowlat.utils.strict_json import MAX_JSON_BYTES, parse_object, quoted

METADATA_FILE = "facts.json"
SHARD_SUFFIX = ".safetensors"

_FOLDER_NAME = re.compile(r"step-([0-9]{8,18})")


def folder_name(step: int) -> str:
    """Folder name of a complete checkpoint."""
    return f"step-{step:08}"


def step_of(name: str) -> int | None:
    """Step of a checkpoint's folder name; None for other names."""
    match = _FOLDER_NAME.fullmatch(name)
    if match is None or folder_name(int(match[1])) != name:
        return None
    return int(match[1])


@final
class TrainingCheckpoint:
    """The state after `step` optimizer steps. A file stays mapped while a tensor of it is alive."""

    def __init__(
        self, folder: Path, *, verify: bool = True, progress: Progress | None = None
    ) -> None:
        """Open and check the checkpoint in `folder`.

        verify: hash every file; otherwise only manifest, names, sizes and headers are checked, for
        a process that opens a checkpoint which another process has verified.
        Raises CorruptCheckpointError if it is not complete, UserError if it cannot be read or has
        another format.
        """
        self.folder = folder
        manifest = read_manifest(folder)
        self.step = manifest.step
        """Optimizer steps done."""
        if self.step != step_of(folder.name):
            raise CorruptCheckpointError(f"its manifest is that of step {self.step}")
        if verify:
            _check_files(folder, manifest, progress or SilentProgress())
        self.metadata: Mapping[str, Any] = _read_metadata(folder, manifest)
        """The state that is not tensors: JSON values."""
        self._files: Mapping[str, SafetensorsFile] = open_shards(folder, manifest.files)

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._files)

    def tensor(self, name: str) -> Tensor:
        """A tensor as a view of its file: writing to it changes a private copy.

        Raises UserError if the checkpoint has none of that name.
        """
        if name not in self._files:
            raise UserError(
                f"{self.folder}: has no tensor {quoted(name)}; it was written for another model or "
                "optimizer"
            )
        return self._files[name].read(name)


def _check_files(folder: Path, manifest: Manifest, progress: Progress) -> None:
    total = sum(digest.size for digest in manifest.files.values())
    with progress.task(f"checking {folder.name}", total, "bytes") as task:
        for name, digest in sorted(manifest.files.items()):
            check_digest(folder / name, digest, task)


def _read_metadata(folder: Path, manifest: Manifest) -> dict[str, Any]:
    if METADATA_FILE not in manifest.files:
        raise CorruptCheckpointError(f"{METADATA_FILE} is missing")
    with reading(folder), (folder / METADATA_FILE).open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    try:
        return parse_object(data, METADATA_FILE)
    except UserError as error:
        raise CorruptCheckpointError(str(error)) from error


def open_shards(folder: Path, names: Iterable[str]) -> dict[str, SafetensorsFile]:
    """The file of every tensor in the shards among `names`.

    Raises CorruptCheckpointError for a file that is no shard, is damaged, or repeats a tensor.
    """
    files: dict[str, SafetensorsFile] = {}
    for name in sorted(names):
        if name == METADATA_FILE:
            continue
        if not name.endswith(SHARD_SUFFIX):
            raise CorruptCheckpointError(f"{quoted(name)} is no shard of a checkpoint")
        file = _open_shard(folder / name)
        for tensor in file.extents:
            if tensor in files:
                raise CorruptCheckpointError(f"tensor {quoted(tensor)} is in two shards")
            files[tensor] = file
    return files


def _open_shard(path: Path) -> SafetensorsFile:
    with reading(path):  # a temporary system error does not mean that the file is corrupt
        try:
            return SafetensorsFile(path)
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise CorruptCheckpointError(str(error)) from error
