"""How much memory this process may use, and whether it keeps what it has freed."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowlat.utils.cgroups import group_folders
from lowlat.utils.machine import physical_memory

RESERVE = 512 * 2**20
"""Bytes the program itself and its caches need beside the weights."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Numbers of glibc's mallopt."""
NEVER = -1
LARGEST_THRESHOLD = 32 * 2**20
"""Where glibc's own adaptation ends, from which blocks are mapped one by one."""
MOST_MAPPED = 65536
"""As glibc begins."""


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of memory of this machine, or of the container or control groups the process runs in if
    that is less. `root` is where proc and sys lie.
    """
    total = physical_memory()
    if sys.platform != "linux":
        return total
    files = [
        folder / name
        for folder in group_folders("memory", root)
        for name in ("memory.max", "memory.limit_in_bytes")
    ]
    limits = [limit for file in files if (limit := _limit(file)) is not None]
    return min([total, *limits])


def is_larger_than_memory(weights_bytes: int) -> bool:
    """Whether weights of this size leave too little room to stay in memory: they are then read
    from their mapped files again and again.
    """
    return weights_bytes > memory_limit() - RESERVE


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """What is freed within stays with the process for what is asked for next, and goes back to the
    system at the end.

    glibc maps large blocks one by one and gives each back at once, so every page of the next has to
    be found and cleared again: half of a training step that has many experts. Without effect where
    there is no glibc.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        # What was set cannot be unset; these are where glibc's own adaptation ends.
        library.mallopt(M_MMAP_MAX, MOST_MAPPED)
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
        library.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_THRESHOLD)
        library.malloc_trim(0)


def _limit(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
