"""Memory, file descriptors and threads of a process tree. Linux only."""

import os
from dataclasses import dataclass
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Sums over the processes of a tree."""

    rss_bytes: int
    """Resident memory without memory-mapped files, whose pages are loaded and evicted freely."""
    descriptors: int
    threads: int
    processes: int


def usage(pid: int) -> Usage:
    """Usage of `pid` and its descendants. Raises ProcessLookupError if `pid` has ended."""
    if not Path(f"/proc/{pid}").exists():
        raise ProcessLookupError(pid)
    found = [one for member in tree(pid) if (one := _of(member)) is not None]
    return Usage(
        rss_bytes=sum(one.rss_bytes for one in found),
        descriptors=sum(one.descriptors for one in found),
        threads=sum(one.threads for one in found),
        processes=len(found),
    )


def tree(pid: int) -> list[int]:
    """`pid` and its descendants."""
    members = [pid]
    for member in members:
        for task in Path(f"/proc/{member}/task").glob("*/children"):
            try:
                members += [int(child) for child in task.read_text().split()]
            except (FileNotFoundError, ProcessLookupError):
                pass  # it has ended meanwhile
    return members


def _of(pid: int) -> Usage | None:
    """Of one process; None if it has ended meanwhile."""
    try:
        resident, shared = (
            int(value) for value in Path(f"/proc/{pid}/statm").read_text().split()[1:3]
        )
        return Usage(
            rss_bytes=(resident - shared) * PAGE,
            descriptors=len(os.listdir(f"/proc/{pid}/fd")),
            threads=len(os.listdir(f"/proc/{pid}/task")),
            processes=1,
        )
    except (FileNotFoundError, ProcessLookupError):
        return None
