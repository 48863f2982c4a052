"""One-line error messages with a remedy for disk errors: full disks, missing permissions."""

import errno
import os
from pathlib import Path

from lowlat.utils.errors import UserError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
"""Error numbers of a full disk or an exhausted quota."""
NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
"""Error numbers of a place that may not be written to."""


def reason_and_remedy(error: OSError, folder: Path) -> str:
    """What the system refused and what to do about it; `folder` where the error names no file."""
    where = os.fspath(folder) if error.filename is None else os.fsdecode(error.filename)
    if error.errno in NO_SPACE:
        return f"the disk of {where} is full; free some space there"
    if error.errno == errno.EFBIG:
        return f"{where} would exceed the largest file allowed; raise the limit (ulimit -f)"
    if error.errno in NO_PERMISSION:
        return f"{where} may not be written to ({error.strerror}); allow it or take another folder"
    return f"{where}: {error.strerror}; check the disk or take another folder"


def resumable_error(destination: Path, partial: Path, error: OSError) -> UserError:
    """The error of a conversion that a disk error stopped; finished parts stay in `partial`."""
    what = f"{destination}: cannot be written ({error.strerror})"
    if not os.path.exists(partial):  # also where a name is too long to be a file's
        return UserError(f"{what}; choose another destination")
    return UserError(
        f"{what}; finished parts stay in {partial}: free some space and run the same command "
        "again, or remove it"
    )
