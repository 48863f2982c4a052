"""Limit of the prefix cache on disk: LRU eviction, and accounting over all processes of a folder.

The file USAGE_FILE holds the bytes in use; its lock (flock) covers every change. A process that is
killed between reserving and writing leaves the number too high until the next count. Only files
that are named as page files are counted and removed.
"""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lowlat.utils.file_lock import wait_for_lock

USAGE_FILE = "usage"
SLACK = 0.05
"""Share of the limit that an eviction frees beyond what is needed, so that few writes evict."""
ABANDONED_SECONDS = 600.0
"""Partial files older than this were left by a process that was killed."""
BLOCK = 4096
"""Files take whole blocks of this many bytes."""
_FOLDER = re.compile(r"[0-9a-f]{32}")
_FILE = re.compile(r"[0-9a-f]{64}(\.[0-9-]+\.partial)?")
_BURST = 100
"""Files examined between pauses, which let the engine's thread run Python code."""


@dataclass(frozen=True, slots=True, order=True)
class _PageFile:
    used_at: int
    """Nanoseconds of Unix time."""
    path: str
    size: int


class DiskBudget:
    """Keeps the page files below `folder` within `limit` bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def count(self) -> int:
        """Count the bytes in use, evict what exceeds the limit and remove abandoned partial files.
        Returns the bytes evicted. O(files)."""
        with self._locked() as usage:
            return self._evict(usage, 0)

    def reserve(self, file_bytes: int) -> int:
        """Reserve bytes for a file, evicting the least recently used files if necessary. Returns
        the bytes evicted."""
        size, evicted = on_disk(file_bytes), 0
        with self._locked() as usage:
            used = _read_number(usage)
            if used is None or used + size > self.limit:
                return self._evict(usage, size)
            _write_number(usage, used + size)
        return evicted

    def give_back(self, file_bytes: int) -> None:
        """Give back the bytes of a file that was removed or could not be written."""
        with self._locked() as usage:
            used = _read_number(usage)
            if used is not None:
                _write_number(usage, max(0, used - on_disk(file_bytes)))

    def _evict(self, usage: int, wanted: int) -> int:
        """Evict until `wanted` more bytes fit, and record the usage with them included."""
        files = sorted(self._files())
        used, evicted = sum(file.size for file in files), 0
        if used + wanted > self.limit:
            target = max(0, self.limit - wanted - int(SLACK * self.limit))
            for place, file in enumerate(files):
                if used - evicted <= target:
                    break
                if place % _BURST == _BURST - 1:
                    time.sleep(0.0002)
                with suppress(FileNotFoundError):
                    os.unlink(file.path)
                evicted += file.size
            self._remove_empty_folders()
        _write_number(usage, used - evicted + wanted)
        return evicted

    def _files(self) -> Iterator[_PageFile]:
        """The page files of all models and namespaces; removes abandoned partial ones."""
        now = time.time()
        number = 0
        for folder in self._folders():
            for entry in _entries(folder):
                number += 1
                if number % _BURST == 0:
                    time.sleep(0.0002)
                match = _FILE.fullmatch(entry.name)
                if match is None:
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                    if match[1] is not None and now - status.st_mtime > ABANDONED_SECONDS:
                        os.unlink(entry.path)
                        continue
                except OSError:
                    continue
                yield _PageFile(status.st_mtime_ns, entry.path, on_disk(status.st_size))

    def _folders(self) -> Iterator[str]:
        """The folders of namespaces."""
        for model in _entries(os.fspath(self.folder)):
            if _FOLDER.fullmatch(model.name) and model.is_dir(follow_symlinks=False):
                for namespace in _entries(model.path):
                    is_folder = namespace.is_dir(follow_symlinks=False)
                    if _FOLDER.fullmatch(namespace.name) and is_folder:
                        yield namespace.path

    def _remove_empty_folders(self) -> None:
        for folder in list(self._folders()):
            with suppress(OSError):  # not empty, or removed by another process
                os.rmdir(folder)
                os.rmdir(os.path.dirname(folder))

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The open usage file, locked."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(self.folder / USAGE_FILE, flags, 0o600)
        try:
            wait_for_lock(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)


def on_disk(file_bytes: int) -> int:
    """Bytes that a file takes."""
    return -(-file_bytes // BLOCK) * BLOCK


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:  # removed by another process
        return []


def _read_number(descriptor: int) -> int | None:
    os.lseek(descriptor, 0, os.SEEK_SET)
    text = os.read(descriptor, 32)
    return int(text) if text.isdigit() else None


def _write_number(descriptor: int, number: int) -> None:
    # Of constant width: a shorter number leaves no digits of a longer one.
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, b"%020d" % number)
