"""Worker subprocess that answers one line with one line, with a time limit per request.

For work that no check inside this process could interrupt, or that may crash. Owns the process, its
time limit and its end; callers and scripts define the lines.
"""

import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

START_SECONDS = 60.0


class LineWorker:
    """A running script; ends with this object or with the program. One thread at a time may ask.

    The script prints a first line when it is ready, then one line for each line it reads.
    """

    def __init__(self, script: Path) -> None:
        # -P keeps the script's folder, whose modules have common names, out of sys.path
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="ascii",
        )
        self._owner = os.getpid()
        self._killed = False
        weakref.finalize(self, _end, self._process, self._owner)
        self._exchange("", START_SECONDS)

    def is_alive(self) -> bool:
        """Whether `ask` can be called; a forked child must not use its parent's worker."""
        usable = self._owner == os.getpid() and not self._killed
        return usable and self._process.poll() is None

    def ask(self, line: str, seconds: float) -> str | None:
        """The answer to `line`; None when the process ended, or was killed after `seconds`.

        The line is ASCII and holds no line break.
        """
        reply = self._exchange(line + "\n", seconds)
        # A kill in the middle of a long answer leaves a piece of a line.
        if reply.endswith("\n"):
            return reply
        self._kill()  # a process that crashed may look alive for a moment
        return None

    def _exchange(self, sent: str, seconds: float) -> str:
        """The line that comes back after `sent`; "" or a part of it when the process ends first."""
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(seconds, self._kill)
        timer.start()
        try:
            self._process.stdin.write(sent)
            self._process.stdin.flush()
            return self._process.stdout.readline()
        except BrokenPipeError:
            return ""
        finally:
            timer.cancel()
            timer.join()

    def _kill(self) -> None:
        self._killed = True
        self._process.kill()


def _end(process: subprocess.Popen, owner: int) -> None:
    if owner != os.getpid():
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        try:
            pipe.close()
        except BrokenPipeError:  # input that the killed process had not read
            pass
