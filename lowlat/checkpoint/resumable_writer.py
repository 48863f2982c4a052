"""Resumable writer of planned files: a journal with the hash of every finished segment.

Everything is written into `.NAME.partial` next to the destination:

    journal.jsonl   what is converted and how; then file and sha256 of each finished segment
    out/            the files

The same conversion started again checks finished segments against the journal and continues with
the first that is missing or damaged; another conversion is refused. At the end `out` (or the one
file in it) is renamed to the destination. Layouts come from `shard_layout` and `gguf.layout`.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lowlat.checkpoint.file_layout import FileLayout, Segment
from lowlat.checkpoint.safetensors.writer import tensor_bytes
from lowlat.utils.atomic_files import (
    CHUNK,
    refuse_existing,
    rename_new,
    sync_descriptor,
    sync_folder,
    sync_parent,
    write_new_files,
)
from lowlat.utils.disk_errors import resumable_error
from lowlat.utils.errors import UserError
from lowlat.utils.file_lock import lock_for_writing
from lowlat.utils.progress import Progress

JOURNAL = "journal.jsonl"
OUT = "out"
SYNC_BYTES = 2**28
"""Bytes written between calls of fsync, so that few wait in memory."""
SPARE_BYTES = 2**24
"""Bytes that the disk must have free in addition to the planned files."""

_log = logging.getLogger(__name__)


def partial_path(dst: Path) -> Path:
    """The folder of an unfinished conversion to `dst`."""
    return dst.with_name(f".{dst.name}.partial")


def write_resumable(
    dst: Path,
    files: Sequence[FileLayout],
    extra_files: Mapping[str, bytes],
    identity: Mapping[str, str],
    progress: Progress,
    label: str,
    *,
    is_file: bool,
) -> None:
    """Write `dst`: a folder of `files` and `extra_files` (by name), or with `is_file` the one of
    `files` itself.

    identity: what is converted and how, as words for error messages; an unfinished conversion is
    resumed only if it is the same. Raises UserError if `dst` exists, another process writes it, a
    different conversion to it is unfinished, or the disk cannot hold the files; exceptions of
    pieces pass through. The partial folder is removed after a UserError of a piece, which would
    occur again; after other exceptions and disk errors it stays.
    """
    dst = Path(os.path.abspath(dst))
    refuse_existing(dst)
    partial = partial_path(dst)
    facts = {**identity, "plan": _digest(files)}
    try:
        with _opened(partial, dst, facts) as (journal, finished):
            try:
                _write_all(dst, partial, files, journal, finished, progress, label)
                made = partial / OUT
                for name in extra_files:
                    (made / name).unlink(missing_ok=True)
                write_new_files(made, extra_files)
                for folder in {(made / name).parent for name in extra_files} | {made}:
                    sync_folder(folder)
                rename_new(made / files[0].name if is_file else made, dst)
                shutil.rmtree(partial, ignore_errors=True)
            except UserError:
                # keep the work if a destination appeared meanwhile: the user may remove it
                if not os.path.lexists(dst):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise resumable_error(dst, partial, error) from error
    sync_parent(dst)


def require_free_space(dst: Path, needed: int) -> None:
    """Raise UserError if the disk has no space for `needed` bytes of `dst`."""
    if shortage := _shortage(dst.parent, needed):
        raise UserError(
            f"{dst}: {shortage} on its disk; free some space or choose another destination"
        )


def _shortage(place: Path, needed: int) -> str:
    """The shortage in words; empty if the disk of `place` has space for `needed` bytes."""
    needed, free = needed + SPARE_BYTES, shutil.disk_usage(place).free
    if needed <= free:
        return ""
    megabyte = 10**6
    return f"{-(-needed // megabyte):,} MB are needed, {free // megabyte:,} MB are free"


@contextmanager
def _opened(
    partial: Path, dst: Path, facts: dict[str, str]
) -> Iterator[tuple[IO[bytes], dict[tuple[str, str], str]]]:
    """The journal, locked and ready for more lines, and the sha256 of every finished segment."""
    (partial / OUT).mkdir(parents=True, exist_ok=True)
    with (partial / JOURNAL).open("a+b") as journal:
        lock_for_writing(journal, dst)
        journal.seek(0)
        # ignore a last line that a crash cut short
        lines = [line for line in journal.read().splitlines(keepends=True) if line.endswith(b"\n")]
        journal.truncate(sum(map(len, lines)))
        if not lines:
            _append(journal, facts)
        else:
            check_same(json.loads(lines[0]), facts, partial)
        entries = [json.loads(line) for line in lines[1:]]
        yield journal, {(entry["file"], entry["at"]): entry["sha256"] for entry in entries}


def check_same(before: Mapping[str, str], facts: Mapping[str, str], partial: Path) -> None:
    """Raise UserError unless the interrupted conversion is the requested one."""
    for key, value in facts.items():
        if before.get(key) != value:
            change = "" if key == "plan" else f" (it was {before.get(key)}, now {value})"
            raise UserError(
                f"{partial}: an unfinished conversion that differs in its {key}{change}; "
                "finish that one, remove the folder, or choose another destination"
            )


def _write_all(
    dst: Path,
    partial: Path,
    files: Sequence[FileLayout],
    journal: IO[bytes],
    finished: dict[tuple[str, str], str],
    progress: Progress,
    label: str,
) -> None:
    total = sum(segment.size for file in files for segment in file.segments)
    kept = sum(
        segment.size
        for file in files
        for segment in file.segments
        if (file.name, segment.label) in finished
    )
    needed = sum(file.size for file in files) - kept
    if not kept:
        require_free_space(dst, needed)
    elif shortage := _shortage(partial, needed):
        raise OSError(errno.ENOSPC, shortage)
    if kept:
        _log.info("%s: resuming after %d bytes", partial, kept)
    with progress.task(label, total, "bytes") as task:
        for file in files:
            path = partial / OUT / file.name
            with path.open("r+b" if path.exists() else "w+b") as out:
                out.write(file.header)
                unsynced = 0
                for segment in file.segments:
                    digest = finished.get((file.name, segment.label))
                    if digest is None or _sha256(out, segment) != digest:
                        line = {"file": file.name, "at": segment.label}
                        _append(journal, line | {"sha256": _write(out, segment)})
                        unsynced += segment.size
                    if unsynced >= SYNC_BYTES:
                        _to_disk(out)
                        unsynced = 0
                    task.advance(segment.size)
                out.truncate(file.size)
                _to_disk(out)


def _write(out: IO[bytes], segment: Segment) -> str:
    """Write the segment and return its sha256."""
    digest, size = hashlib.sha256(), 0
    out.seek(segment.start)
    for piece in segment.pieces():
        data = tensor_bytes(piece)
        size += len(data)
        assert size <= segment.size, segment.label
        digest.update(data)
        out.write(data)
    assert size == segment.size, segment.label
    out.flush()
    return digest.hexdigest()


def _sha256(out: IO[bytes], segment: Segment) -> str:
    """sha256 of the segment as the file holds it."""
    digest, left = hashlib.sha256(), segment.size
    out.seek(segment.start)
    while left and (data := out.read(min(CHUNK, left))):
        digest.update(data)
        left -= len(data)
    return digest.hexdigest()


def _append(journal: IO[bytes], line: Mapping[str, str]) -> None:
    journal.write(json.dumps(line).encode() + b"\n")
    journal.flush()


def _to_disk(out: IO[bytes]) -> None:
    out.flush()
    sync_descriptor(out.fileno())
    with suppress(OSError, AttributeError):  # only advice
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _digest(files: Sequence[FileLayout]) -> str:
    """Hash of the whole layout."""
    places = [
        [
            file.name,
            hashlib.sha256(file.header).hexdigest(),
            [(segment.label, segment.start, segment.size) for segment in file.segments],
        ]
        for file in files
    ]
    return hashlib.sha256(json.dumps(places).encode()).hexdigest()


def options_text(options: Mapping[str, Any]) -> str:
    """Options in a few words, for `identity`."""
    return ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
