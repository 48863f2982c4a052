"""A worker's answers; its failures do not reach the caller."""

from pathlib import Path

import pytest

from lowlat.utils.worker import LineWorker

ECHO = """\
import os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    if line == "hang\\n":
        time.sleep(600)
    if line == "crash\\n":
        os.abort()
    if line == "half\\n":
        print("half a line", end="", flush=True)
        os.abort()
    print(line.upper(), end="", flush=True)
"""


@pytest.fixture
def worker(tmp_path: Path) -> LineWorker:
    script = tmp_path / "echo.py"
    script.write_text(ECHO)
    return LineWorker(script)


def test_it_answers_line_by_line(worker: LineWorker) -> None:
    assert [worker.ask(line, 60.0) for line in ("a", "", "b" * 99_999)] == [
        *("A\n", "\n"),
        "B" * 99_999 + "\n",
    ]
    assert worker.is_alive()


@pytest.mark.parametrize(("line", "seconds"), [("hang", 0.2), ("crash", 60.0), ("half", 60.0)])
def test_it_ends_with_its_error(worker: LineWorker, line: str, seconds: float) -> None:
    """Regression: a process that is dying, taken for one that can be asked."""
    assert worker.ask(line, seconds) is None
    assert not worker.is_alive()
    assert worker.ask("a", 60.0) is None
