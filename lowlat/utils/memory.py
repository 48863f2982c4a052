"""Memory limit of this process (machine, container, cgroups); retaining freed memory (mallopt)."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowlat.utils.cgroups import group_folders
from lowlat.utils.machine import physical_memory

_processes = 1

RESERVE = 512 * 2**20
"""Bytes that the program itself and its caches need in addition to the weights."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Numbers of glibc's mallopt."""
NEVER = -1
LARGEST_THRESHOLD = 32 * 2**20
"""Upper end of glibc's dynamic mmap threshold."""
MOST_MAPPED = 65536
"""glibc's default."""


def share_memory(processes: int) -> None:
    """Divide the machine's memory among this many equal processes of one run."""
    global _processes
    _processes = processes


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of memory of this machine, or of the process's container or control groups if less,
    divided by the processes of `share_memory`, which also share the groups of their parent. `root`
    is the folder of proc and sys.
    """
    limits = [physical_memory() // _processes]
    if sys.platform == "linux":
        parent = str(os.getppid())
        is_known = (root / "proc" / parent / "cgroup").exists()
        shared = group_folders("memory", root, parent if is_known else "self")
        for folder in group_folders("memory", root):
            for name in ("memory.max", "memory.limit_in_bytes"):
                limit = _limit(folder / name)
                if limit is not None:
                    limits.append(limit // _processes if folder in shared else limit)
    return min(limits)


def proportional_memory() -> int:
    """Bytes of this process's resident memory, those that n processes share counted as 1/n
    (proportional set size); 0 where Linux's /proc is missing."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def is_larger_than_memory(weights_bytes: int) -> bool:
    """Whether weights of this size do not fit: memory-mapped, they are then read from their files
    repeatedly (offload to disk), and the process does not run out of memory."""
    return weights_bytes > memory_limit() - RESERVE


@contextmanager
def retain_freed_memory() -> Iterator[None]:
    """Within this context, freed memory stays in the process for reuse; it is returned at the end.

    glibc maps large blocks one by one and unmaps each when it is freed, so the kernel clears every
    page of the next one again. That takes half of a training step with many experts. No effect
    without glibc.
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
        # settings cannot be unset; these are the upper ends of glibc's own adaptation
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
