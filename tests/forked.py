"""subprocess for Python programs (-c, -m, FILE): forks of a process that has imported lowlat.

A new interpreter takes seconds for the import. A fork has its own arguments, environment, folder,
streams and exit status. It shares what an interpreter reads at its start: PYTHONHASHSEED,
OMP_NUM_THREADS, and options other than -u. If its environment has CHILDREN, programs that it starts
are forks, too.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CHILDREN = "LOWLAT_TEST_FORKED_CHILDREN"
PRELOADED = ("torch", "numpy", "safetensors.torch", "tokenizers", "pydantic")
PRELOADED += ("torch.distributed.fsdp", "torch.distributed.pipelining", "torch.utils.checkpoint")
PRELOADED += ("typer", "rich.live", "jaxtyping", "jinja2.sandbox", "llguidance", "httpx")
PRELOADED += ("prometheus_client", "starlette.applications", "uvicorn", "h11", "pydantic.main")
PRELOADED += ("gguf", "lowlat.cli.main", "lowlat.serve.run", "lowlat.train.run.trainer")
MESSAGE = 2**17
Interpreter = subprocess.Popen
"""subprocess's class, which forks and some tests replace by Popen."""
_servers: list[socket.socket] = []
"""In a fork: the connection to the process that forks its children."""


class Popen(Interpreter):
    """subprocess.Popen that forks plain `python -c`, `-m` and FILE, and starts others as usual."""

    _ended: socket.socket | None = None

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
        creationflags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *rest
    ):  # fmt: skip
        """Override of the method in which subprocess calls fork and exec."""
        environment = dict(os.environ if env is None else env)
        arguments = [os.fspath(each) for each in args[1:]]
        if is_unbuffered := arguments[0] == "-u":
            arguments = arguments[1:]
        is_plain = args[0] == sys.executable
        is_plain &= arguments[0] in ("-c", "-m") or arguments[0][0] != "-"
        is_plain &= preexec_fn is None and "PYTHONOPTIMIZE" not in environment
        if not is_plain or (server := _server()) is None:
            super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
                creationflags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *rest
            )  # fmt: skip
            return
        streams = dict(enumerate((p2cread, c2pwrite, errwrite))) | {fd: fd for fd in pass_fds}
        request = {
            "arguments": arguments,
            "folder": os.fspath(cwd or os.getcwd()),
            "environment": environment,
            "descriptors": list(streams),
            "is_session": rest[5],
            "is_unbuffered": is_unbuffered,
        }
        self._ended, other = socket.socketpair(type=socket.SOCK_SEQPACKET)
        given = [number if used == -1 else used for number, used in streams.items()]
        with other:
            message = json.dumps(request).encode()
            socket.send_fds(server, [message], [other.fileno(), server.fileno(), *given])
        self.pid = int(self._ended.recv(MESSAGE))
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """subprocess's waitpid: this process is not the parent, which sends the status."""
        if self._ended is None:
            return super()._try_wait(wait_flags)
        if wait_flags & os.WNOHANG and not select.select([self._ended], [], [], 0)[0]:
            return 0, 0
        with self._ended:
            return self.pid, int(self._ended.recv(MESSAGE))

    def _internal_poll(self, *others: Any, **options: Any) -> int | None:
        if self._ended is None:
            return super()._internal_poll(*others, **options)
        if self.returncode is None and self._waitpid_lock.acquire(blocking=False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid == self.pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def run(
    command: Sequence[Any],
    *,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """subprocess.run."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    given = options.pop("input", None)
    if given is not None:
        options["stdin"] = subprocess.PIPE
    with Popen(command, **options) as process:
        try:
            output, errors = process.communicate(given, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


@functools.cache
def _server() -> socket.socket | None:
    """Starts the process that forks; it ends when this one does."""
    if __name__ == "__main__":  # a fork
        return _servers[0] if _servers else None
    mine, its = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with its:
        process = Interpreter(
            [sys.executable, "-m", "tests.forked", str(its.fileno())],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            pass_fds=[its.fileno()],
        )

    def end() -> None:
        with mine, contextlib.suppress(BrokenPipeError):  # an interrupted one has ended
            mine.send(b"")
        process.wait()

    atexit.register(end)
    return mine


def _serve(control: socket.socket) -> Callable[[], object]:
    """Forks for each request, and exits with the last; in a fork, returns the program to run."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MESSAGE, 64)
        if not message:
            sys.exit()
        if os.fork() == 0:
            control.close()
            return _forked(json.loads(message), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _forked(request: dict[str, Any], descriptors: list[int]) -> Callable[[], object]:
    """Forks once more: the parent waits for the program and sends its status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ended, server, *descriptors = descriptors
    with socket.socket(fileno=ended) as ended:
        child = os.fork()
        if child != 0:
            for descriptor in [server, *descriptors]:
                os.close(descriptor)
            with contextlib.suppress(BrokenPipeError):  # what started it may be killed
                ended.send(str(child).encode())
                ended.send(str(os.waitpid(child, 0)[1]).encode())
            os._exit(0)
    if request["is_session"]:
        os.setsid()
    _servers.append(socket.socket(fileno=fcntl.fcntl(server, fcntl.F_DUPFD_CLOEXEC, 500)))
    os.close(server)
    # Copies get high numbers, as the numbers that the program needs may be in use by others.
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 500) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(high, request["descriptors"], strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    return functools.partial(_run, request)


def _run(request: dict[str, Any]) -> None:
    """The program, as a new interpreter would run it."""
    own = _python_path()
    libraries = [folder for folder in sys.path[1:] if folder not in own]
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if CHILDREN not in os.environ:
        _servers.pop().close()
    if options := os.environ.get("PYTHONWARNINGS"):
        warnings._processoptions(options.split(","))
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    sys.stdout.reconfigure(write_through=request["is_unbuffered"])
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")
    first, *rest = request["arguments"]
    option, folder = first, os.path.dirname(os.path.abspath(first))
    if first in ("-c", "-m"):
        name, *rest = rest
        folder = "" if first == "-c" else os.getcwd()
    sys.argv = [option, *rest]
    sys.path[:] = [folder, *_python_path(), *libraries]
    found = (
        folder for each in sys.path if Path(folder := os.path.abspath(each), "lowlat").is_dir()
    )
    if next(found, f"{ROOT}") != f"{ROOT}":
        _forget_lowlat()
    if option == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(name, "<string>", "exec"), main.__dict__)
    elif option == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(first, run_name="__main__")


def _forget_lowlat() -> None:
    """The program imports lowlat from another folder."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "lowlat"]:
        del sys.modules[name]


def _python_path() -> list[str]:
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [os.path.abspath(folder) for folder in given if folder]


if __name__ == "__main__":
    subprocess.Popen = Popen
    for module in PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    program = _serve(socket.socket(fileno=int(sys.argv[1])))
    program()
