"""Writing one save: everything into a hidden folder, brought to the disk, renamed last.

    .step-00001000.writing/   under construction, by one process or by several
    step-00001000/            whole: only ever made by the rename
    .step-00001000.deleting/  on its way out: renamed first, so that no half of it passes for whole

Owns the order of these things. Which saves exist and which are kept is `saves`'. OSError passes
through from the functions that do not say otherwise.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowlat.train.checkpoints.checkpoint import FACTS_FILE, PART_SUFFIX, folder_name, open_parts
from lowlat.train.checkpoints.errors import BrokenSaveError, SaveError, reading
from lowlat.train.checkpoints.manifest import MANIFEST_FILE, Manifest, check_part_name
from lowlat.train.checkpoints.part import NamedTensor, write_part
from lowlat.utils.atomic_files import (
    FileDigest,
    remove_flat_folder,
    rename_folder,
    sync_folder,
    write_new_file,
)
from lowlat.utils.progress import amount
from lowlat.utils.strict_json import MAX_JSON_BYTES, parse_object

RECORD_SUFFIX = ".part.json"
SPACE_LEFT = 1 << 20
"""Bytes of the disk that a save leaves to the logs of the run."""

_WRITING = re.compile(r"\.step-[0-9]+\.writing")
_DELETING = re.compile(r"\.step-[0-9]+\.deleting")


def encode_facts(facts: Mapping[str, Any]) -> bytes:
    """Facts as they are written; TypeError or ValueError for what JSON does not hold."""
    data = (json.dumps(facts, indent=1, allow_nan=False) + "\n").encode()
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"facts of {len(data)} bytes; large state belongs into a part")
    return data


def write_save(
    saves: Path, step: int, parts: Mapping[str, Sequence[NamedTensor]], facts: bytes, now: float
) -> None:
    """Write the whole save of `step` into `saves`; nothing of it stays if that fails."""
    _check_names(parts)
    partial = _partial(saves, step)
    _refuse_existing(saves, step)
    if partial.is_dir():
        remove_flat_folder(partial)
    require_room(saves, step, [pair for tensors in parts.values() for pair in tensors])
    try:
        os.mkdir(partial)
        records = {
            part + PART_SUFFIX: write_part(partial / (part + PART_SUFFIX), tensors)
            for part, tensors in parts.items()
        }
        _complete(partial, step, records, facts, now)
    except BaseException:
        _discard(partial)
        raise
    sync_folder(saves)


def write_one_part(saves: Path, step: int, part: str, tensors: Sequence[NamedTensor]) -> None:
    """Write one part of the save of `step` and, beside it, the record that `commit_save` needs."""
    check_part_name(part)
    partial = _partial(saves, step)
    _refuse_existing(saves, step)
    partial.mkdir(exist_ok=True)
    record_file, part_file = partial / (part + RECORD_SUFFIX), partial / (part + PART_SUFFIX)
    for leftover in (record_file, part_file):
        leftover.unlink(missing_ok=True)
    require_room(saves, step, tensors)
    record = write_part(part_file, tensors)
    content = json.dumps({"size": record.size, "sha256": record.sha256}).encode()
    write_new_file(record_file, [content])


def commit_save(saves: Path, step: int, parts: Sequence[str], facts: bytes, now: float) -> None:
    """Make one save of `parts`, all of which were written by `write_one_part`.

    Raises SaveError if a part is missing, is not what its writer recorded, or has a tensor that
    another has, and if the folder holds anything else; then nothing of the save stays.
    """
    partial = _partial(saves, step)
    _refuse_existing(saves, step)
    try:
        try:
            records = {part + PART_SUFFIX: _recorded(partial, part) for part in parts}
            for name in sorted(set(os.listdir(partial)) - records.keys()):
                raise BrokenSaveError(f"{name} belongs to no part")
            open_parts(partial, records)
        except BrokenSaveError as error:
            raise SaveError(
                f"save of step {step}: {error}; every process must have written its part before"
            ) from error
        _complete(partial, step, records, facts, now)
    except BaseException:
        _discard(partial)
        raise
    sync_folder(saves)


def require_room(saves: Path, step: int, tensors: Iterable[NamedTensor]) -> None:
    """Raise SaveError unless the disk has room for `tensors`.

    A save that began all the same would fill the disk until it fails, and whatever else the run
    writes there meanwhile would fail with it.
    """
    needed = SPACE_LEFT + sum(tensor.numel() * tensor.dtype.itemsize for _, tensor in tensors)
    free = shutil.disk_usage(saves).free
    if free < needed:
        raise SaveError(
            f"save of step {step}: needs {amount(needed, 'bytes')}, but the disk of {saves} has "
            f"{amount(free, 'bytes')} left; free some space there"
        )


def delete_save(saves: Path, step: int) -> None:
    """Remove a save; at any moment it is whole under its name or no save at all."""
    aside = saves / f".{folder_name(step)}.deleting"
    rename_folder(saves / folder_name(step), aside)
    remove_flat_folder(aside)


def clear_deleted(saves: Path) -> None:
    """Finish removals that were cut off."""
    _clear(saves, _DELETING)


def clear_unfinished(saves: Path) -> None:
    """Remove what a process that died was writing; no other process may be writing."""
    _clear(saves, _WRITING)


def _clear(saves: Path, kind: re.Pattern[str]) -> None:
    for name in sorted(os.listdir(saves)):
        if kind.fullmatch(name):
            remove_flat_folder(saves / name)


def _partial(saves: Path, step: int) -> Path:
    return saves / f".{folder_name(step)}.writing"


def _refuse_existing(saves: Path, step: int) -> None:
    if os.path.lexists(saves / folder_name(step)):
        raise SaveError(f"save of step {step}: {saves / folder_name(step)} exists already; move it")


def _check_names(parts: Mapping[str, Iterable[NamedTensor]]) -> None:
    seen: set[str] = set()
    for part, tensors in parts.items():
        check_part_name(part)
        names = [name for name, _ in tensors]
        twice = seen.intersection(names)
        if twice:
            raise ValueError(f"tensors {sorted(twice)[:3]} come in more than one part")
        seen.update(names)


def _recorded(partial: Path, part: str) -> FileDigest:
    """What the writer of `part` says about it; its record is removed."""
    path = partial / (part + RECORD_SUFFIX)
    if not path.exists():
        raise BrokenSaveError(f"part {part} was not written")
    with reading(path):
        content = path.read_bytes()
        size = (partial / (part + PART_SUFFIX)).stat().st_size
    record = _parse_record(content, part)
    if size != record.size:
        raise BrokenSaveError(f"part {part} has {size} bytes, its writer wrote {record.size}")
    path.unlink()
    return record


def _parse_record(content: bytes, part: str) -> FileDigest:
    try:
        fields = parse_object(content, f"record of part {part}")
        return FileDigest(size=int(fields["size"]), sha256=str(fields["sha256"]))
    except KeyError as error:
        raise BrokenSaveError(f"record of part {part} lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise BrokenSaveError(f"record of part {part} is not what was written: {error}") from error


def _complete(
    partial: Path, step: int, records: dict[str, FileDigest], facts: bytes, now: float
) -> None:
    """Facts, manifest, and the rename that makes it a save."""
    records = records | {FACTS_FILE: write_new_file(partial / FACTS_FILE, [facts])}
    manifest = Manifest(step=step, time=now, files=records)
    write_new_file(partial / MANIFEST_FILE, [manifest.encode()])
    sync_folder(partial)
    os.rename(partial, partial.with_name(folder_name(step)))


def _discard(partial: Path) -> None:
    """Remove what a failure left; the failure itself is what the caller must hear of, and what
    cannot be removed here goes at the next attempt or start.
    """
    try:
        remove_flat_folder(partial)
    except OSError:
        pass
