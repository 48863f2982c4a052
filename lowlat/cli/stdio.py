"""Standard streams of the command: replace closed ones, report write errors as UserError."""

import io
import os
import sys
from typing import TextIO

from lowlat.utils.errors import UserError


class _Output(io.FileIO):
    """Standard output that raises UserError if it cannot be written. A closed pipe stays a
    BrokenPipeError.
    """

    def write(self, data, /):  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UserError(
                f"standard output cannot be written ({error.strerror}); free disk space, or "
                "redirect it"
            ) from error


def open_streams() -> None:
    """Replace closed standard streams.

    Closed stdin is empty and closed stderr discards everything. Writing to closed stdout is an
    error, so that no result is lost unnoticed.
    """
    # In the order of file descriptors: opening takes the lowest free one.
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    if sys.stdout is None:
        sys.stdout = sys.__stdout__ = open(os.open(os.devnull, os.O_RDONLY), "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    # A Python caller may have replaced sys.stdout.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _watched(sys.stdout)


def abandon_output() -> None:
    """Discard unwritable output, which would fail again at interpreter exit."""
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
