"""Writer of one training checkpoint: a hidden folder, fsync, then the rename that commits it.

    .step-00001000.writing/   being written
    step-00001000/            complete: only ever made by the rename
    .step-00001000.deleting/  being removed: renamed first, so that no half of it counts as complete

Functions raise OSError unless documented otherwise.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowlat.checkpoint.safetensors.writer import NamedTensor, write_safetensors
from lowlat.train.checkpoints.checkpoint import METADATA_FILE, folder_name
from lowlat.train.checkpoints.errors import CheckpointWriteError
from lowlat.train.checkpoints.manifest import MANIFEST_FILE, Manifest
from lowlat.utils.atomic_files import (
    remove_flat_folder,
    rename_folder,
    sync_folder,
    write_new_file,
)
from lowlat.utils.progress import amount
from lowlat.utils.strict_json import MAX_JSON_BYTES

STATE_FILE = "state.safetensors"
SPACE_LEFT = 1 << 20
"""Bytes of disk space that a checkpoint leaves free for the logs of the run."""

WRITING = re.compile(r"\.step-[0-9]+\.writing")
DELETING = re.compile(r"\.step-[0-9]+\.deleting")


def encode_metadata(metadata: Mapping[str, Any]) -> bytes:
    """Encode metadata; raises TypeError or ValueError for values that JSON cannot hold."""
    data = (json.dumps(metadata, indent=1, allow_nan=False) + "\n").encode()
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"metadata of {len(data)} bytes; large state belongs into a tensor")
    return data


def write_training_checkpoint(
    root: Path, step: int, tensors: Sequence[NamedTensor], metadata: bytes, now: float
) -> None:
    """Write the checkpoint of `step` into `root`; a failure removes the partial checkpoint."""
    partial = root / f".{folder_name(step)}.writing"
    if os.path.lexists(folder := root / folder_name(step)):
        raise CheckpointWriteError(f"checkpoint of step {step}: {folder} exists already; move it")
    if partial.is_dir():
        remove_flat_folder(partial)
    require_free_space(root, step, tensors)
    try:
        os.mkdir(partial)
        digests = {
            STATE_FILE: write_safetensors(partial / STATE_FILE, tensors),
            METADATA_FILE: write_new_file(partial / METADATA_FILE, [metadata]),
        }
        manifest = Manifest(step=step, time=now, files=digests)
        write_new_file(partial / MANIFEST_FILE, [manifest.encode()])
        sync_folder(partial)
        os.rename(partial, root / folder_name(step))
    except BaseException:
        # Of two failures the caller sees the first; the next attempt removes what is left.
        with contextlib.suppress(OSError):
            remove_flat_folder(partial)
        raise
    sync_folder(root)


def require_free_space(root: Path, step: int, tensors: Iterable[NamedTensor]) -> None:
    """Raise CheckpointWriteError unless the disk has space for `tensors`.

    A checkpoint that began anyway would fill the disk until it fails, and the run's other writes
    would fail with it.
    """
    needed = SPACE_LEFT + sum(tensor.numel() * tensor.dtype.itemsize for _, tensor in tensors)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise CheckpointWriteError(
            f"checkpoint of step {step}: needs {amount(needed, 'bytes')}, but the disk of {root} "
            f"has {amount(free, 'bytes')} left; free some space there"
        )


def delete_training_checkpoint(root: Path, step: int) -> None:
    """Remove a checkpoint atomically: it is complete under its name or does not exist."""
    aside = root / f".{folder_name(step)}.deleting"
    rename_folder(root / folder_name(step), aside)
    remove_flat_folder(aside)


def clear_leftovers(root: Path, *kinds: re.Pattern[str]) -> None:
    """Finish interrupted removals (`DELETING`), or remove partial checkpoints of killed processes
    (`WRITING`), while no other process may be writing.
    """
    for name in sorted(os.listdir(root)):
        if any(kind.fullmatch(name) for kind in kinds):
            remove_flat_folder(root / name)
