"""Native CPU kernels: availability, instruction-set level and thread count.

The environment variable LOWLAT_ISA selects a level instead of the best one, or `none` for plain
PyTorch. Without the native module lowlat runs slowly in PyTorch.
"""

import logging
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from lowlat.utils.cgroups import group_folders
from lowlat.utils.errors import UserError

log = logging.getLogger(__name__)

ISA_VARIABLE = "LOWLAT_ISA"
OFF = "none"
REMEDY = (
    "to build the native kernels, install a C++20 compiler (Debian, Ubuntu: apt install g++; "
    "Fedora: dnf install gcc-c++) and install lowlat again"
)


@cache
def _found() -> tuple[ModuleType | None, str]:
    """The initialised module, or None and the reason."""
    wanted = os.environ.get(ISA_VARIABLE, "")
    if wanted == OFF:
        return None, f"{ISA_VARIABLE}={OFF} turns the native kernels off"
    try:
        from lowlat import _native
    except ImportError as error:
        if wanted:
            raise UserError(
                f"{ISA_VARIABLE}={wanted} asks for native kernels, but they cannot be loaded "
                f"({error}); {REMEDY}"
            ) from error
        return None, f"the native kernels cannot be loaded ({error}); {REMEDY}"
    if wanted:
        usable = _native.usable_levels()
        if wanted not in usable:
            names = ", ".join([*usable, OFF])
            raise UserError(
                f"{ISA_VARIABLE}={wanted} is none of the levels of this machine and build: {names}"
            )
        _native.set_level(wanted)
    _native.set_threads(_default_threads())
    return _native, ""


def available() -> bool:
    """Whether the native kernels are built and LOWLAT_ISA does not disable them.

    Raises UserError for a LOWLAT_ISA that this machine does not support.
    """
    return _found()[0] is not None


def reason() -> str:
    """Why `available` is false, with the remedy; empty if it is true."""
    return _found()[1]


def module() -> ModuleType:
    """The native module; requires `available`."""
    found = _found()[0]
    assert found is not None, _found()[1]
    return found


@cache
def warn_if_absent() -> None:
    """Log once that lowlat runs slowly without the native kernels, with the remedy."""
    if not available() and os.environ.get(ISA_VARIABLE) != OFF:
        log.warning("lowlat runs slow on this CPU: %s", reason())


def levels() -> list[str]:
    """Instruction-set levels of this machine and build, best first; empty without the module."""
    found = _found()[0]
    return [] if found is None else found.usable_levels()


def level() -> str:
    return module().level()


def processors() -> int:
    """Processors of this process: its affinity, limited by the cgroup quota, rounded up."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1)
    limit = _cgroup_limit()
    return allowed if limit is None else max(1, min(allowed, limit))


def _cgroup_limit(root: Path = Path("/")) -> int | None:
    """CPU quota of this process's cgroups in processors, rounded up; None without a limit. `root`
    contains proc and sys.
    """
    quotas = (_quota(folder) for folder in group_folders("cpu", root))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(group: Path) -> int | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    return -(-int(quota) // int(period))


def _default_threads() -> int:
    """All processors, or fewer if OMP_NUM_THREADS is lower, as in PyTorch."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(processors(), int(asked)) if asked.isdigit() and int(asked) > 0 else processors()


def use_threads(count: int) -> None:
    """Set the threads of PyTorch and the native kernels. Raises UserError for fewer than one or
    more than there are processors: threads that wait for each other on one processor slow each
    other down.
    """
    most = processors()
    if not 1 <= count <= most:
        raise UserError(f"--threads {count}: this machine has {most} processors; give 1 to {most}")
    torch.set_num_threads(count)
    if available():
        module().set_threads(count)


def threads() -> int:
    return module().threads()


def keep_torch_single_threaded() -> None:
    """Limit PyTorch's thread pool to one thread: its idle threads spin, and two spinning pools
    halve each other's speed.
    """
    torch.set_num_threads(1)
