"""Atomic, durable files and folders: write a temporary file, fsync, atomic rename, fsync the parent
folder.

After a power cut a file or folder has its old content or all of its new content. OSError passes
through unless a function documents UserError.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lowlat.utils.disk_errors import NO_SPACE
from lowlat.utils.errors import UserError
from lowlat.utils.file_lock import folder_lock

CHUNK = 1 << 23
"""Bytes hashed and written, or read and hashed, at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDigest:
    """Size and hash of a file's content."""

    size: int
    """Bytes."""
    sha256: str
    """Of the whole content, in hexadecimal."""


# Files


def write_new_file(
    path: Path, pieces: Iterable[bytes | memoryview], *, mode: int = 0o666
) -> FileDigest:
    """Write a file that must not exist yet and fsync it, hashing on the way. `mode`: its
    permissions, less the umask.

    The entry in its folder is not durable before `sync_folder`.
    """
    digest, size = hashlib.sha256(), 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0), mode)
    try:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            for start in range(0, len(view), CHUNK):
                chunk = view[start : start + CHUNK]
                digest.update(chunk)
                _write_all(descriptor, chunk)
                size += len(chunk)
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)
    return FileDigest(size=size, sha256=digest.hexdigest())


def write_new_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by name into a folder and fsync them; a name may begin with one subfolder's."""
    for name, content in files.items():
        path = folder / name
        if path.parent != folder:
            path.parent.mkdir(exist_ok=True)
        write_new_file(path, [content])


def replace_file(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Replace a file by atomic rename: at any moment it has the old content or the new one. `mode`
    as in `write_new_file`."""
    partial = path.with_name(f".{path.name}.writing")
    partial.unlink(missing_ok=True)
    try:
        write_new_file(partial, [content], mode=mode)
        os.rename(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


# Folders


@contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `destination` when left without an exception.

    Until then it is `.NAME.partial-PID` next to the destination. An exception removes it; one left
    by a killed process is removed by the next call for the same destination. Raises UserError
    where the destination exists or the disk refuses.
    """
    destination = Path(os.path.abspath(destination))
    refuse_existing(destination)
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        _remove_abandoned(destination)
        os.mkdir(partial)
        with folder_lock(partial):
            yield partial
            for path in sorted(partial.rglob("*")):
                sync_path(path)
            rename_new(partial, destination)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        what = f"{destination}: cannot be written ({error.strerror or error}); nothing was left"
        remedy = "; free some space on its disk" if error.errno in NO_SPACE else ""
        raise UserError(what + remedy) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_parent(destination)


def refuse_existing(destination: Path) -> None:
    """Raise UserError unless `destination` can be made."""
    if os.path.lexists(destination):
        raise UserError(f"{destination}: exists already; choose another destination or remove it")
    if not destination.parent.is_dir():
        raise UserError(f"{destination.parent}: is not a folder; create it first")


def rename_new(made: Path, destination: Path) -> None:
    """Atomic rename of a file or folder, after fsync, to a destination that must not exist.

    `sync_parent` makes the rename itself durable. Raises UserError if `destination` exists.
    """
    sync_path(made)
    refuse_existing(destination)
    os.rename(made, destination)


def sync_parent(destination: Path) -> None:
    """Make the rename to `destination` durable. Raises UserError where the disk refuses."""
    try:
        sync_folder(destination.parent)
    except OSError as error:
        raise UserError(
            f"{destination}: is complete, but {destination.parent} could not be brought to the "
            f"disk ({error.strerror})"
        ) from error


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, durably; it may exist already."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def rename_folder(folder: Path, to: Path) -> None:
    """Rename within one parent, durably."""
    os.rename(folder, to)
    sync_folder(to.parent)


def remove_flat_folder(folder: Path) -> None:
    """Remove a folder that holds files only, and these files."""
    for name in sorted(os.listdir(folder)):
        os.unlink(folder / name)
    os.rmdir(folder)


# fsync


def sync_path(path: Path) -> None:
    """fsync a closed file, or the entries of a folder."""
    if path.is_dir():
        sync_folder(path)
        return
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """fsync a folder's entries: files created, renamed or removed in it (not on Windows)."""
    if sys.platform == "win32":  # which cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sync_descriptor(descriptor: int) -> None:
    """fsync an open file; on macOS also out of the drive's cache."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def _write_all(descriptor: int, chunk: memoryview) -> None:
    while chunk:
        chunk = chunk[os.write(descriptor, chunk) :]


def _remove_abandoned(destination: Path) -> None:
    """Remove partial folders of `destination` that killed processes left: those without a lock."""
    prefix = f".{destination.name}.partial-"
    for folder in [f for f in destination.parent.iterdir() if f.name.startswith(prefix)]:
        with folder_lock(folder) as is_free:
            if is_free:
                shutil.rmtree(folder)
