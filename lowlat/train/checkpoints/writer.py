"""Writer of one training checkpoint: a hidden folder, fsync, then the rename that commits it.

    .step-00001000.writing/   being written, by one process or by several
    step-00001000/            complete: only ever made by the rename
    .step-00001000.deleting/  being removed: renamed first, so that no half of it counts as complete

`store` applies retention. Functions raise OSError unless documented otherwise.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowlat.checkpoint.safetensors.writer import NamedTensor, write_safetensors
from lowlat.train.checkpoints.checkpoint import (
    METADATA_FILE,
    SHARD_SUFFIX,
    folder_name,
    open_shards,
)
from lowlat.train.checkpoints.errors import (
    CheckpointWriteError,
    CorruptCheckpointError,
    reading,
)
from lowlat.train.checkpoints.manifest import MANIFEST_FILE, Manifest, check_shard_name
from lowlat.utils.atomic_files import (
    FileDigest,
    remove_flat_folder,
    rename_folder,
    sync_folder,
    write_new_file,
)
from lowlat.utils.progress import amount
from lowlat.utils.strict_json import MAX_JSON_BYTES, parse_object

DIGEST_SUFFIX = ".part.json"
"""File next to a shard with its size and hash, from its writer to the process that commits."""
SPACE_LEFT = 1 << 20
"""Bytes of disk space that a checkpoint leaves free for the logs of the run."""

_WRITING = re.compile(r"\.step-[0-9]+\.writing")
_DELETING = re.compile(r"\.step-[0-9]+\.deleting")


def encode_metadata(metadata: Mapping[str, Any]) -> bytes:
    """Encode metadata; raises TypeError or ValueError for values that JSON cannot hold."""
    data = (json.dumps(metadata, indent=1, allow_nan=False) + "\n").encode()
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"metadata of {len(data)} bytes; large state belongs into a shard")
    return data


def write_training_checkpoint(
    root: Path, step: int, shards: Mapping[str, Sequence[NamedTensor]], metadata: bytes, now: float
) -> None:
    """Write the checkpoint of `step` into `root`; a failure removes the partial checkpoint."""
    _check_names(shards)
    partial = _partial(root, step)
    _refuse_existing(root, step)
    if partial.is_dir():
        remove_flat_folder(partial)
    require_free_space(root, step, [pair for tensors in shards.values() for pair in tensors])
    try:
        os.mkdir(partial)
        digests = {
            shard + SHARD_SUFFIX: write_safetensors(partial / (shard + SHARD_SUFFIX), tensors)
            for shard, tensors in shards.items()
        }
        _complete(partial, step, digests, metadata, now)
    except BaseException:
        _discard(partial)
        raise
    sync_folder(root)


def write_shard(root: Path, step: int, shard: str, tensors: Sequence[NamedTensor]) -> None:
    """Write one shard of the checkpoint of `step`, and the digest that the commit needs."""
    check_shard_name(shard)
    partial = _partial(root, step)
    _refuse_existing(root, step)
    partial.mkdir(exist_ok=True)
    digest_file, shard_file = partial / (shard + DIGEST_SUFFIX), partial / (shard + SHARD_SUFFIX)
    for leftover in (digest_file, shard_file):
        leftover.unlink(missing_ok=True)
    require_free_space(root, step, tensors)
    digest = write_safetensors(shard_file, tensors)
    content = json.dumps({"size": digest.size, "sha256": digest.sha256}).encode()
    write_new_file(digest_file, [content])


def commit_training_checkpoint(
    root: Path, step: int, shards: Sequence[str], metadata: bytes, now: float
) -> None:
    """Make one checkpoint of `shards`, all of which were written by `write_shard`.

    A failure removes the partial checkpoint. Raises CheckpointWriteError if a shard is missing,
    differs from its recorded digest or repeats a tensor, and if the folder has other files.
    """
    partial = _partial(root, step)
    _refuse_existing(root, step)
    try:
        try:
            digests = {shard + SHARD_SUFFIX: _take_digest(partial, shard) for shard in shards}
            for name in sorted(set(os.listdir(partial)) - digests.keys()):
                raise CorruptCheckpointError(f"{name} belongs to no shard")
            open_shards(partial, digests)
        except CorruptCheckpointError as error:
            raise CheckpointWriteError(
                f"checkpoint of step {step}: {error}; every process must write its shard before"
            ) from error
        _complete(partial, step, digests, metadata, now)
    except BaseException:
        _discard(partial)
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


def clear_deleted(root: Path) -> None:
    """Finish interrupted removals."""
    _clear(root, _DELETING)


def clear_unfinished(root: Path) -> None:
    """Remove partial checkpoints of killed processes; no other process may be writing."""
    _clear(root, _WRITING)


def _clear(root: Path, kind: re.Pattern[str]) -> None:
    for name in sorted(os.listdir(root)):
        if kind.fullmatch(name):
            remove_flat_folder(root / name)


def _partial(root: Path, step: int) -> Path:
    return root / f".{folder_name(step)}.writing"


def _refuse_existing(root: Path, step: int) -> None:
    folder = root / folder_name(step)
    if os.path.lexists(folder):
        raise CheckpointWriteError(f"checkpoint of step {step}: {folder} exists already; move it")


def _check_names(shards: Mapping[str, Iterable[NamedTensor]]) -> None:
    seen: set[str] = set()
    for shard, tensors in shards.items():
        check_shard_name(shard)
        names = [name for name, _ in tensors]
        twice = seen.intersection(names)
        if twice:
            raise ValueError(f"tensors {sorted(twice)[:3]} come in more than one shard")
        seen.update(names)


def _take_digest(partial: Path, shard: str) -> FileDigest:
    """Read and remove the digest file of `shard`."""
    path = partial / (shard + DIGEST_SUFFIX)
    if not path.exists():
        raise CorruptCheckpointError(f"shard {shard} was not written")
    with reading(path):
        content = path.read_bytes()
        size = (partial / (shard + SHARD_SUFFIX)).stat().st_size
    digest = _parse_digest(content, shard)
    if size != digest.size:
        raise CorruptCheckpointError(
            f"shard {shard} has {size} bytes, its writer wrote {digest.size}"
        )
    path.unlink()
    return digest


def _parse_digest(content: bytes, shard: str) -> FileDigest:
    where = f"digest of shard {shard}"
    try:
        fields = parse_object(content, where)
        return FileDigest(size=int(fields["size"]), sha256=str(fields["sha256"]))
    except KeyError as error:
        raise CorruptCheckpointError(f"{where} lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"{where} is not what was written: {error}") from error


def _complete(
    partial: Path, step: int, digests: dict[str, FileDigest], metadata: bytes, now: float
) -> None:
    """Write metadata and manifest, then commit the checkpoint by renaming the folder."""
    digests = digests | {METADATA_FILE: write_new_file(partial / METADATA_FILE, [metadata])}
    manifest = Manifest(step=step, time=now, files=digests)
    write_new_file(partial / MANIFEST_FILE, [manifest.encode()])
    sync_folder(partial)
    os.rename(partial, partial.with_name(folder_name(step)))


def _discard(partial: Path) -> None:
    """Remove a partial checkpoint after a failure. OSErrors are ignored, so that the caller sees
    the original failure; the next attempt or start removes the rest.
    """
    try:
        remove_flat_folder(partial)
    except OSError:
        pass
