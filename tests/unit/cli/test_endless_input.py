"""Inputs without end: one line and exit code 2 from every verb, with bounded memory."""

import sys
from pathlib import Path

import pytest

from tests import forked

LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
from lowlat.cli.main import run
run()
"""
"""A verb whose address space has a limit; torch maps about 3 GB."""
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
        command = [sys.executable, "-c", LIMITED, *arguments.split()]
        ended = forked.run(command, stdin=stdin, capture_output=True, text=True, timeout=60)
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("Loading")]
    assert ended.returncode == 2, ended.stderr
    assert len(lines) == 1 and lines[0].startswith("lowlat: error:") and message in lines[0]
