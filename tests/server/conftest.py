"""Fixtures: servers in separate processes, on free ports."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import forked

TESTS = Path(__file__).parents[1]
KEY = "integration-test-key"


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def logged(self) -> str:
        """Everything on its stderr so far."""
        return self.log.read_text()


@contextlib.contextmanager
def serving(*options: str) -> Iterator[Server]:
    """A server of tiny_server.py with `options`; it must end with exit code 0 on SIGTERM."""
    with socket.socket() as listener, tempfile.NamedTemporaryFile("w") as log:
        listener.bind(("127.0.0.1", 0))
        command = [sys.executable, str(Path(__file__).with_name("tiny_server.py"))]
        paths = [str(TESTS), os.environ.get("PYTHONPATH")]
        process = forked.Popen(
            [*command, str(listener.fileno()), *options],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            pass_fds=[listener.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        # By its name: a file opened again has a place of its own, and the server writes at its.
        server = Server(process, listener.getsockname()[1], Path(log.name))
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", server.logged()
            # The server has its own; clients of one that is killed are refused, and need not wait.
            listener.close()
            yield server
            if process.poll() is None:
                process.terminate()
            # Longer than a drain takes by far, as a machine may have much else to do.
            assert process.wait(180) == 0, server.logged()
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for all tests of a module; it wants KEY."""
    with serving("--key", KEY) as running:
        yield running
