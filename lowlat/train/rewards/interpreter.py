"""Interpreters for reward code: fixed hash seed, one thread, few environment variables."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PASSED = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH")
"""Environment variables that the code gets; others may hold secrets."""
FIXED = {
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


def command(module: str, *arguments: str) -> list[str]:
    """Runs `main` of a lowlat module. lowlat's folder is last on the module path."""
    boot = f"import sys; sys.path.append(sys.argv[1]); from {module} import main; main()"
    return [sys.executable, "-P", "-c", boot, str(ROOT), *arguments]


def environment() -> dict[str, str]:
    """The environment of reward code."""
    return {name: os.environ[name] for name in PASSED if name in os.environ} | FIXED
