"""How much memory this process may use; nothing else."""

import os
import sys
from pathlib import Path

from lowlat.utils.cgroups import group_folders

RESERVE = 512 * 2**20
"""Bytes the program itself and its caches need beside the weights."""


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of memory of this machine, or of the container or control groups the process runs in if
    that is less. `root` is where proc and sys lie.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
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


def _limit(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
