"""Description of this machine for reports: processor, memory, versions of packages.

Reads only; nothing is measured.
"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

KERNEL_FLAGS = (
    "amx_int8",
    "amx_bf16",
    "avx512_bf16",
    "avx512_vnni",
    "avx512vbmi",
    "avx512f",
    "avx2",
    "fma",
    "asimd",
)
"""Processor flags that decide which kernels can run."""


class Processor(NamedTuple):
    """The CPU as the system names it."""

    model: str
    """Model name: 'AMD EPYC 9B14'."""
    flags: list[str]
    """Those of KERNEL_FLAGS that it has."""


def processor() -> Processor:
    """The processor of this machine, from /proc/cpuinfo where the system has it."""
    fields: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    model = fields.get("model name") or platform.processor() or platform.machine()
    return Processor(model, [flag for flag in KERNEL_FLAGS if flag in flags])


def physical_memory() -> int:
    """Bytes of memory of the machine, limits of containers not considered."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def package_version(name: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
