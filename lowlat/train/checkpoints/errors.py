"""Errors of training checkpoints, and context managers that turn OSError into them."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowlat.utils.disk_errors import reason_and_remedy
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import quoted

_DAMAGED = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ELOOP}


class CheckpointWriteError(UserError):
    """A checkpoint could not be written; every earlier one is unchanged."""


class CorruptCheckpointError(UserError):
    """A checkpoint differs from what was written."""


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turn OSError into CheckpointWriteError: `what` cannot be written into `folder`."""
    try:
        yield
    except OSError as error:
        raise CheckpointWriteError(
            f"{what}: cannot be written, {reason_and_remedy(error, folder)}"
        ) from error


@contextmanager
def using(folder: Path) -> Iterator[None]:
    """Turn OSError into UserError: `folder` cannot be used."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be used, {reason_and_remedy(error, folder)}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn OSError into CorruptCheckpointError if the file is missing or damaged, else UserError.

    A file that may be intact but cannot be read now (permissions, too many open files) raises
    UserError, so that the run does not fall back to an older checkpoint.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _DAMAGED:
            raise CorruptCheckpointError(
                f"{quoted(path.name)} cannot be read ({error.strerror})"
            ) from error
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); make it readable and start again"
        ) from error
