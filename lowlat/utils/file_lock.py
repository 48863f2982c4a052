"""File locks (flock) that the kernel drops when the process ends, however it ends.

Windows has no flock: there the functions do nothing, and two processes may do the same work.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lowlat.utils.errors import UserError


def try_lock(descriptor: int) -> bool:
    """Take the exclusive lock of an open file; False if another process holds it."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(descriptor: int) -> None:
    """Take the exclusive lock of an open file, waiting while another process holds it."""
    if sys.platform == "win32":
        return
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX)


def lock_for_writing(file: IO[bytes], destination: Path) -> None:
    """Lock an open file for the one process that writes `destination`, until the file is closed.

    Raises UserError if another process holds the lock.
    """
    if not try_lock(file.fileno()):
        raise UserError(f"{destination}: another process is writing it; wait for it to end")


@contextmanager
def folder_lock(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder; yields False if another process holds it."""
    if sys.platform == "win32":
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield try_lock(descriptor)
    finally:
        os.close(descriptor)
