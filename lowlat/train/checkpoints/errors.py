"""Faults of saves, and how the operating system's errors become one line with a remedy.

Owns the wording; which fault stops a run is `saves`' rule.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowlat.utils.disk_errors import reason_and_remedy
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import quoted

_DAMAGED = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ELOOP}


class SaveError(UserError):
    """A save could not be written; every earlier one is as it was."""


class BrokenSaveError(UserError):
    """A save is not, byte for byte, what was written."""


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turns OSError into SaveError: `what` could not be written into `folder`."""
    try:
        yield
    except OSError as error:
        raise SaveError(f"{what}: cannot be written, {reason_and_remedy(error, folder)}") from error


@contextmanager
def using(folder: Path) -> Iterator[None]:
    """Turns OSError into UserError: `folder` cannot be used."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be used, {reason_and_remedy(error, folder)}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns OSError into BrokenSaveError where the file is gone or damaged.

    Where it may be whole but cannot be read at the moment (permissions, open files), UserError:
    such a save must not be passed over for an older one.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _DAMAGED:
            raise BrokenSaveError(
                f"{quoted(path.name)} cannot be read ({error.strerror})"
            ) from error
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); make it readable and start again"
        ) from error
