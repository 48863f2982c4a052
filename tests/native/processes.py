"""Code run by a new process, which may choose another level, fork, or end."""

import os
import subprocess
import sys
from pathlib import Path

from lowlat.ops import native
from tests import forked

TESTS = Path(__file__).parents[1]


def run(code: str, isa: str | None = None) -> subprocess.CompletedProcess[str]:
    """`code` in a new process with LOWLAT_ISA set to `isa`."""
    environment = {name: value for name, value in os.environ.items() if name != native.ISA_VARIABLE}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    if isa is not None:
        environment[native.ISA_VARIABLE] = isa
    return forked.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
