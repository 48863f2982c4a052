"""Benchmark environment: processor, memory, package versions, commit."""

import platform
import subprocess
from pathlib import Path
from typing import Any

from lowlat.ops import native
from lowlat.utils.machine import package_version, physical_memory, processor

PACKAGES = ("lowlat", "torch", "numpy")


def describe() -> dict[str, Any]:
    """The "machine" object of benchmark results."""
    cpu = processor()
    return {
        "cpu": cpu.model,
        "flags": cpu.flags,
        "isa": native.level() if native.available() else "plain PyTorch",
        "cores": native.processors(),
        "memory_bytes": physical_memory(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "commit": commit(),
    }


def commit() -> str | None:
    """Commit of the source tree, with "+changes" if files differ; None outside a Git checkout."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        name = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{name}+changes" if changed else name


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.stdout.strip()
