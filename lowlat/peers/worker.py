"""Worker process protocol, host side: start a peer's worker, send requests, suspend it when idle.

Idle workers are suspended with SIGSTOP, because thread pools of numeric libraries spin for a while
after each operation. Every worker leads a process group, so that signals reach its children too.
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
"""Seconds for one answer."""
CLOSING = 5.0
SETTINGS = {"GGML_NO_BACKTRACE": "1", "TOKENIZERS_PARALLELISM": "false"}
BOOT = (
    "import runpy, sys; sys.path.append(sys.argv[1]); "
    "runpy.run_module(sys.argv[2], run_name='__main__')"
)
"""Code of the worker process. lowlat's folder is last on the path, so that a peer's interpreter
uses its own packages.
"""


class PeerError(Exception):
    """A peer does not support a request or has failed; the message is the reason."""


class UnsupportedRequest(PeerError):
    """A peer does not support a request; the worker is usable for others."""


class NotInstalled(UserError):
    """An import fails in the worker's interpreter: a package is missing there."""

    def __init__(self, name: str, python: str, detail: str) -> None:
        self.detail = detail
        super().__init__(
            f"{name} is not installed for {python} ({detail}); install it there, or give "
            f"--peers {name}=PYTHON with an interpreter that has it"
        )


class Worker:
    """A running worker process. Use as a context manager; leaving it ends the process.

    Args:
        name: of the program, for messages and its log.
        module: lowlat module that the worker runs; it ends in `protocol.serve_requests`.
        python: interpreter that has the program.
        threads: for the thread pools of OpenMP, MKL and OpenBLAS; None leaves the environment.
        folder: for its log; also its working directory, so that no file of the user's is imported.
    """

    def __init__(
        self, name: str, module: str, *, python: str, threads: int | None, folder: Path
    ) -> None:
        self.name = name
        self.python = python
        self.log = folder / f"{name}-{time.monotonic_ns()}.log"
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        pools = {} if threads is None else dict.fromkeys(names, str(threads))
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, "-c", BOOT, str(Path(__file__).parents[2]), module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env=os.environ | SETTINGS | pools,
                start_new_session=True,
            )
        self._pending = b""
        self._failure: str | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, op: str, *, timeout: float = TIMEOUT, **arguments: Any) -> dict[str, Any]:
        """Send one request and return its answer. Resumes the worker meanwhile.

        Raises PeerError if the worker does not support the request or fails, NotInstalled for a
        missing package, UserError for a UserError in the worker.
        """
        if self._failure is not None:
            raise PeerError(self._failure)
        self._signal(signal.SIGCONT)
        try:
            answer = self._exchange({"op": op, **arguments}, timeout)
        except BaseException as error:
            self._failure = str(error) if isinstance(error, PeerError) else "interrupted"
            self._kill()
            raise
        self._signal(signal.SIGSTOP)
        return self._checked(answer)

    def close(self) -> None:
        """End the process and its children."""
        if self._process.poll() is None and self._failure is None:
            self._signal(signal.SIGCONT)
            try:
                self._send({"op": "quit"})
                self._process.wait(CLOSING)
            except (OSError, subprocess.TimeoutExpired):
                pass  # killed below
        self._failure = self._failure or "has been closed"
        self._kill()

    def _exchange(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        try:
            self._send(request)
        except OSError as error:
            raise PeerError(self._cause_of_end()) from error
        return json.loads(self._line(timeout))

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def _line(self, timeout: float) -> bytes:
        """The next line of stdout, without blocking past `timeout` seconds."""
        assert self._process.stdout is not None
        until = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise PeerError(f"no answer within {timeout:.0f} s")
                piece = os.read(self._process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise PeerError(self._cause_of_end())
                self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        if "not_installed" in answer:
            raise NotInstalled(self.name, self.python, answer["not_installed"])
        if "user_error" in answer:
            raise UserError(answer["user_error"])
        if "error" in answer:
            raise PeerError(f"failed: {answer['error']}")
        if "unsupported" in answer:
            raise UnsupportedRequest(answer["unsupported"])
        return answer

    def _cause_of_end(self) -> str:
        """Exit code or signal of the process, and the last line of its log."""
        try:
            code = self._process.wait(CLOSING)
        except subprocess.TimeoutExpired:
            code = 0  # output closed, but still running
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{how}; {lines[-1][-300:]}" if lines else how

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass  # ended; the next read reports it

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass  # the process has ended
