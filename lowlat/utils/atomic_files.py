"""Files and folders that survive a power cut: written, brought to the disk, renamed, removed.

Owns the order of system calls and the digest of what was written. Knows nothing of saves. OSError
passes through.
"""

import hashlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 23
"""Bytes hashed and written, or read and hashed, at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """What a file holds."""

    size: int
    """Bytes."""
    sha256: str
    """Of all of them, in hexadecimal."""


def write_new(path: Path, pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a file that must not exist yet and bring it to the disk, hashing on the way.

    Its folder's entry is not brought to the disk: see `sync_folder`.
    """
    digest, size = hashlib.sha256(), 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            for start in range(0, len(view), CHUNK):
                chunk = view[start : start + CHUNK]
                digest.update(chunk)
                _write_all(descriptor, chunk)
                size += len(chunk)
        _sync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(size=size, sha256=digest.hexdigest())


def replace_file(path: Path, content: bytes) -> None:
    """Make `path` a file with this content; at any moment it holds the old one or this one."""
    partial = path.with_name(f".{path.name}.writing")
    partial.unlink(missing_ok=True)
    try:
        write_new(partial, [content])
        os.rename(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for good; one may be there already."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def move_folder(folder: Path, to: Path) -> None:
    """Rename within one parent, for good."""
    os.rename(folder, to)
    sync_folder(to.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder that holds no folders, and the files in it."""
    for name in sorted(os.listdir(folder)):
        os.unlink(folder / name)
    os.rmdir(folder)


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk: files created, renamed or removed in it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, chunk: memoryview) -> None:
    while chunk:
        chunk = chunk[os.write(descriptor, chunk) :]


def _sync(descriptor: int) -> None:
    if sys.platform == "darwin":  # fsync leaves the data in the drive's cache there
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)
