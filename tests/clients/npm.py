"""Commands of the npm packages in package.json: installed by `npm ci --ignore-scripts`."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SECONDS = 240.0
"""Far longer than a client needs: the machine may have much else to do."""
NOWHERE = "http://127.0.0.1:9"
"""A proxy that does not exist, so that a client reaches this machine alone."""
REQUIRED = "LOWLAT_REQUIRE_CLIENTS"
"""Variable that .ci/run sets: a missing client then fails its test."""
MISSING = "needs nodejs, and `npm ci --ignore-scripts` in tests/clients"


def script(path: str) -> list[str]:
    """The command line that runs the script `path` of a package. Without it the test is skipped, or
    fails if REQUIRED is set.
    """
    node, file = shutil.which("node"), FOLDER / "node_modules" / path
    if node is None or not file.exists():
        if os.environ.get(REQUIRED):
            pytest.fail(MISSING, pytrace=False)
        pytest.skip(MISSING)
    return [node, str(file)]


def run(
    command: Sequence[str], *, home: Path, cwd: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a client with a home folder of its own, and no network but this machine."""
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), NOWHERE)
    own = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
    basics = {"PATH": os.environ["PATH"], "HOME": str(home), "TERM": "dumb"}
    return subprocess.run(
        command,
        cwd=cwd,
        env={**basics, **proxies, **own, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
