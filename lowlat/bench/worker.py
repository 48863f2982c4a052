"""The host's side of a worker: starts it, asks it, and stops it while others are measured.

Idle workers are stopped with SIGSTOP, because the thread pools of numeric libraries spin for a
while after each piece of work. Every worker leads a process group, so that what it starts is
stopped and ended with it.
"""

import json
import os
import selectors
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from lowlat.utils.errors import UserError

TIMEOUT = 900.0
CLOSING = 5.0
SETTINGS = {"GGML_NO_BACKTRACE": "1", "TOKENIZERS_PARALLELISM": "false"}
BOOT = (
    "import runpy, sys; sys.path.append(sys.argv[1]); "
    "runpy.run_module(sys.argv[2], run_name='__main__')"
)
"""lowlat's folder comes last on the path: a peer's own packages are the ones it uses."""


class Refused(Exception):
    """The worker did not measure something; the message says why."""


class Worker:
    """A running worker. Use as a context manager; leaving it ends the process."""

    def __init__(self, name: str, module: str, *, python: str, threads: int, folder: Path) -> None:
        self.name = name
        self.python = python
        self.log = folder / f"{name}-{time.monotonic_ns()}.log"
        pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, "-c", BOOT, str(Path(__file__).parents[2]), module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env=os.environ | SETTINGS | dict.fromkeys(pools, str(threads)),
                start_new_session=True,
            )
        self._pending = b""
        self._fault: str | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, op: str, *, timeout: float = TIMEOUT, **arguments: Any) -> dict[str, Any]:
        """The answer to one request; the worker runs only meanwhile.

        Raises Refused where the worker does not do that or has failed, UserError for what the user
        can mend: a package that is not installed, a model or precision lowlat does not take.
        """
        if self._fault is not None:
            raise Refused(self._fault)
        self._signal(signal.SIGCONT)
        try:
            answer = self._exchange({"op": op, **arguments}, timeout)
        except BaseException as error:
            self._fault = str(error) if isinstance(error, Refused) else "interrupted"
            self._kill()
            raise
        self._signal(signal.SIGSTOP)
        return self._checked(answer)

    def close(self) -> None:
        """End the process and everything it started."""
        if self._process.poll() is None and self._fault is None:
            self._signal(signal.SIGCONT)
            try:
                self._send({"op": "quit"})
                self._process.wait(CLOSING)
            except (OSError, subprocess.TimeoutExpired):
                pass  # it is killed below
        self._fault = self._fault or "has been closed"
        self._kill()

    def _exchange(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        try:
            self._send(request)
        except OSError as error:
            raise Refused(self._last_words()) from error
        return json.loads(self._line(timeout))

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def _line(self, timeout: float) -> bytes:
        """The next line of answers, without buffering beyond what has come."""
        assert self._process.stdout is not None
        until = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise Refused(f"no answer within {timeout:.0f} s")
                piece = os.read(self._process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise Refused(self._last_words())
                self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        if "absent" in answer:
            raise UserError(
                f"{self.name} is not installed for {self.python} ({answer['absent']}); install it "
                f"there, or give --peers {self.name}=PYTHON with an interpreter that has it"
            )
        if answer.get("type") == "UserError":
            raise UserError(answer["error"])
        if "error" in answer:
            raise Refused(f"failed: {answer['error'].splitlines()[0]}")
        if "refused" in answer:
            raise Refused(answer["refused"])
        return answer

    def _last_words(self) -> str:
        """How the process ended, and what it said last."""
        try:
            code = self._process.wait(CLOSING)
        except subprocess.TimeoutExpired:
            code = 0  # it closed its output and lives on
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{how}; {lines[-1][-300:]}" if lines else how

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass  # it has ended; the next read says so

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass  # what was not yet sent is of no use to a process that has ended
