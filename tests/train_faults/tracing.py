"""Stands between the code under test and the file system: records operations, fails one, or ends
the process there.

Only operations on files under one folder count. Functions that do file work are replaced in `os`
and `io`, where the code under test looks them up.
"""

import io
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest.mock import patch

BY_PATH = ("open", "rename", "mkdir", "unlink", "rmdir", "listdir", "scandir")
BY_DESCRIPTOR = ("write", "pwrite", "ftruncate", "fsync", "close")
DEATH = 77
"""Exit status of a process that ended at an operation."""


@dataclass(frozen=True)
class Operation:
    """One call, before it is made."""

    name: str
    path: str
    """Of the file or folder; for descriptors the path they were opened with."""
    target: str = ""
    """Of a rename."""
    data: bytes = b""
    """Of a write."""
    creates: bool = False
    """Of an open: whether it may make the file."""


Hook = Callable[[int, Operation], OSError | None]
"""Sees every operation with its number; an error that it returns is raised in place of the call."""


class Tracer:
    """Within `with`, operations under `root` go through `hook`."""

    def __init__(self, root: Path, hook: Hook, *, torn: bool = False) -> None:
        """torn: a write that fails, or that the process ends at, has done half of its work."""
        self.operations: list[Operation] = []
        self._root = os.fspath(root)
        self._hook = hook
        self._torn = torn
        self._opened: dict[int, str] = {}
        self._patches = ExitStack()

    def __enter__(self) -> "Tracer":
        for name in BY_PATH:
            self._replace(os, name, self._by_path(name, getattr(os, name)))
        for name in BY_DESCRIPTOR:
            self._replace(os, name, self._by_descriptor(name, getattr(os, name)))
        self._replace(io, "open", self._by_path("read", io.open))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._patches.close()

    def _replace(self, module: Any, name: str, function: Callable[..., Any]) -> None:
        self._patches.enter_context(patch.object(module, name, function))

    def _by_path(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            place = os.path.abspath(os.fspath(path)) if not isinstance(path, int) else ""
            if not place.startswith(self._root):
                return real(path, *args, **options)
            target = os.path.abspath(os.fspath(args[0])) if name == "rename" else ""
            creates = name == "open" and bool(args[0] & os.O_CREAT)
            self._step(Operation(name, place, target=target, creates=creates))
            result = real(path, *args, **options)
            if name == "open":
                self._opened[result] = place
            return result

        return call

    def _by_descriptor(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *args: Any) -> Any:
            if descriptor not in self._opened:
                return real(descriptor, *args)
            data = bytes(args[0]) if name in ("write", "pwrite") else b""
            operation = Operation(name, self._opened[descriptor], data=data)
            if name == "close":  # a descriptor is gone even when closing reports an error
                del self._opened[descriptor]
                real(descriptor)
                self._step(operation)
                return None
            half = None
            if name == "write" and self._torn:
                half = lambda: real(descriptor, data[: len(data) // 2])  # noqa: E731
            self._step(operation, half)
            return real(descriptor, *args)

        return call

    def _step(self, operation: Operation, before: Callable[[], object] | None = None) -> None:
        number = len(self.operations)
        self.operations.append(operation)
        error = self._hook(number, operation)
        if error is not None:
            if before is not None:
                before()
            if isinstance(error, Death):
                os._exit(DEATH)
            raise error


class Death(OSError):
    """What a hook returns to end the process."""


def nothing(number: int, operation: Operation) -> OSError | None:
    """The hook that only lets things be recorded."""
    return None


def fail_at(chosen: int, errno: int) -> Hook:
    def hook(number: int, operation: Operation) -> OSError | None:
        return OSError(errno, os.strerror(errno), operation.path) if number == chosen else None

    return hook


def die_at(chosen: int) -> Hook:
    def hook(number: int, operation: Operation) -> OSError | None:
        return Death() if number == chosen else None

    return hook


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; its exit status: 0 done, 1 failed, DEATH."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
