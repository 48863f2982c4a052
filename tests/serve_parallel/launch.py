"""Starts torchrun on this machine, with a store on a free port."""

import os
import subprocess
import sys
from pathlib import Path

from tests import forked

ROOT = Path(__file__).parents[2]
PATIENCE = 1200.0
"""Seconds that a launch may take on a machine with much else to do."""


def torchrun(processes: int, *arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
    """`processes` processes of `python *arguments`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launcher.append(f"--max-restarts={restarts}")
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        forked.CHILDREN: "1",
    }
    return forked.Popen(
        [sys.executable, *launcher, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], patience: float = PATIENCE) -> tuple[int, str, str]:
    """Exit code, output and errors of a launch, which is killed after `patience` seconds."""
    try:
        output, errors = process.communicate(timeout=patience)
        return process.returncode, output, errors
    finally:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """Kill the launcher and its processes."""
    if process.poll() is None:
        os.killpg(process.pid, 9)
        process.wait()
