"""The memory a process may use, from a tree of files like Linux's, and what it keeps of it."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowlat.utils import memory
from lowlat.utils.memory import memory_limit


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) == memory_limit(tmp_path / "absent") > 2**28


@pytest.mark.parametrize(
    ("groups", "limits", "smallest"),
    [
        (
            "4:memory:/a/b\n3:cpu,cpuacct:/a\n0::/\n",
            {
                "memory/a/b/memory.limit_in_bytes": 1000,
                "memory/memory.limit_in_bytes": 2**63 - 4096,
            },
            1000,
        ),
        ("0::/a\n", {"a/memory.max": 2000}, 2000),
        ("0::/a/b/c\n", {"a/b/c/memory.max": "max", "a/memory.max": 4000}, 4000),
        ("4:memory:/a/b\n", {"memory/a/memory.limit_in_bytes": 5000}, 5000),
    ],
    ids=["own, v1", "own, v2", "above, v2", "above, v1"],
)
def test_limits_of_the_own_group_and_those_above_count(
    tmp_path: Path, groups: str, limits: dict[str, int | str], smallest: int
) -> None:
    """Regression: reading the topmost group's limit only, which a process outside a container does
    not live in, or missing a service's limit that is its slice's.
    """
    files = {f"sys/fs/cgroup/{name}": f"{limit}\n" for name, limit in limits.items()}
    root = written(tmp_path, files | {"proc/self/cgroup": groups})
    assert memory_limit(root) == smallest


def test_a_containers_limit_counts_and_max_is_none(tmp_path: Path) -> None:
    root = written(tmp_path, {"sys/fs/cgroup/memory.max": "3000\n"})
    assert memory_limit(root) == 3000
    written(tmp_path, {"sys/fs/cgroup/memory.max": "max\n"})
    assert memory_limit(root) > 2**28


def test_processes_share_the_groups_of_their_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: half of the limit of a group that has one of two processes."""
    monkeypatch.setattr(memory, "_processes", 2)
    files = {
        "proc/self/cgroup": "0::/run/one\n",
        "sys/fs/cgroup/run/memory.max": "8000\n",
        "sys/fs/cgroup/run/one/memory.max": "3000\n",
    }
    root = written(tmp_path, files)
    assert memory_limit(root) == 1500  # the parent is unknown
    written(tmp_path, {f"proc/{os.getppid()}/cgroup": "0::/run\n"})
    assert memory_limit(root) == 3000
    written(tmp_path, {"sys/fs/cgroup/run/one/memory.max": "5000\n"})
    assert memory_limit(root) == 4000


def test_freed_memory_is_kept_and_then_given_back() -> None:
    """Counts page faults: memory that comes from the system each time causes one per page."""
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this C library gives memory back as it likes")
    program = """
import resource
from lowlat.utils.memory import retain_freed_memory
size = 64 * 2**20
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def resident(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def take():
    before = faults()
    bytearray(size)
    return faults() - before
before = resident()
with retain_freed_memory():
    first, again, kept = take(), take(), resident()
print(first, again, kept - before > size / 2, resident() - before < size / 2, take())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    first, again, kept, is_back, outside = done.stdout.split()
    assert kept == is_back == "True"
    assert int(again) < int(first) / 10 and int(outside) > int(first) / 2
