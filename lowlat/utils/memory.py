"""How much memory this process may use; nothing else."""

import os
import sys
from pathlib import Path

RESERVE = 512 * 2**20
"""Bytes the program itself and its caches need beside the weights."""


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of memory of this machine, or of the container or control group the process runs in if
    that is less. `root` is where proc and sys lie.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if sys.platform != "linux":
        return total
    limits = [limit for file in _limit_files(root) if (limit := _limit(file)) is not None]
    return min([total, *limits])


def is_larger_than_memory(weights_bytes: int) -> bool:
    """Whether weights of this size leave too little room to stay in memory: they are then read
    from their mapped files again and again.
    """
    return weights_bytes > memory_limit() - RESERVE


def _limit_files(root: Path) -> list[Path]:
    """Files that may hold a limit: of the process's own group in cgroup 1 and 2, and of the group a
    container shows as its topmost.
    """
    top = root / "sys/fs/cgroup"
    files = [top / "memory.max", top / "memory/memory.limit_in_bytes"]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return files
    for line in lines:
        _, controllers, group = line.split(":", 2)
        group = group.lstrip("/")
        if controllers == "":
            files.append(top / group / "memory.max")
        elif "memory" in controllers.split(","):
            files.append(top / "memory" / group / "memory.limit_in_bytes")
    return files


def _limit(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
