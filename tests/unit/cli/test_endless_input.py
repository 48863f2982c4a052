"""Inputs without end: one line and exit code 2 from every verb, with bounded memory."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

MEMORY = 8 * 2**30
"""Address space of the verbs; torch maps about 3 GB."""
ENDLESS = Path("/dev/zero")

pytestmark = pytest.mark.skipif(not ENDLESS.exists(), reason="this system has no /dev/zero")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("eval minnow --text /dev/zero", "'/dev/zero': is a device, not a file"),
        ("generate minnow -p -", "standard input: has more than 64 MiB"),
        pytest.param("chat minnow", "standard input: a line has more than", marks=pytest.mark.slow),
        pytest.param("train /dev/zero", "/dev/zero: is a device", marks=pytest.mark.slow),
        pytest.param(
            "serve minnow --api-key-file /dev/zero",
            "--api-key-file '/dev/zero': is a device",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "compare minnow minnow --text /dev/zero",
            "'/dev/zero': is a device",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "convert absent out --to mla --cache 0.5 --calibrate /dev/zero",
            "--calibrate /dev/zero: is not a regular file",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_endless_input_is_refused(arguments: str, message: str) -> None:
    with ENDLESS.open("rb") as stdin:
        ended = subprocess.run(
            [sys.executable, "-m", "lowlat", *arguments.split()],
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
        )
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("Loading")]
    assert ended.returncode == 2, ended.stderr
    assert len(lines) == 1 and lines[0].startswith("lowlat: error:") and message in lines[0]
