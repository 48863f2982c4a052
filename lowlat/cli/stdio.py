"""The standard streams of the command: what stands for closed ones, what an output that takes no
more says. Owns no wording but that.
"""

import io
import os
import sys
from typing import TextIO

from lowlat.utils.errors import UserError


class _Output(io.FileIO):
    """Standard output. Raises UserError where it takes no more, but for a pipe whose reader has
    gone, which is no fault.
    """

    def write(self, data, /):  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UserError(
                f"standard output cannot be written ({error.strerror}); make room there, or send "
                "it elsewhere"
            ) from error


def open_streams() -> None:
    """Make standard input, output and error files that can be used as such.

    Closed input has nothing to read, closed error takes everything; closed output takes nothing,
    so that no result is lost unnoticed.
    """
    # In the order of their numbers, since a file takes the lowest that is free.
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    if sys.stdout is None:
        sys.stdout = sys.__stdout__ = open(os.open(os.devnull, os.O_RDONLY), "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    # Who calls the command from Python may have put another file there.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _watched(sys.stdout)


def abandon_output() -> None:
    """Let what cannot be written go nowhere: at the interpreter's exit it would fail again."""
    try:
        sys.stdout.flush()
    except (UserError, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _watched(output: TextIO) -> TextIO:
    assert isinstance(output, io.TextIOWrapper)
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(output.fileno(), "w", closefd=False)),
        encoding=output.encoding,
        errors=output.errors,
        line_buffering=output.line_buffering,
        write_through=output.write_through,
    )
