"""Read whole files and pipes that users name, with bounded memory: no devices, no endless input."""

import io
import stat
from collections.abc import Callable
from pathlib import Path

from lowlat.utils.errors import UserError

CHUNK = 1 << 20
"""Bytes read at once."""


def read_bounded(path: Path, limit: int, where: str) -> bytes:
    """All bytes of a file or pipe that has at most `limit`.

    Raises UserError starting with `where` for a device or a longer file, OSError for one that
    cannot be read.
    """
    # Before it is opened: opening can change the state of a device.
    info = path.stat()
    if stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
        raise UserError(f"{where}: is a device, not a file; give the path of a file")
    if info.st_size > limit:
        raise _too_long(limit, where)
    with path.open("rb") as file:
        return read_stream(file.read, limit, where)


def read_bounded_text(path: Path, limit: int, where: str) -> str:
    """The same as UTF-8 text, with every line end as \\n. Raises UnicodeDecodeError."""
    text = read_bounded(path, limit, where).decode("utf-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_stream(read: Callable[[int], bytes], limit: int, where: str) -> bytes:
    """All bytes of a stream with the method `read`. Raises UserError starting with `where` if it
    has more than `limit`.
    """
    found = io.BytesIO()
    while piece := read(CHUNK):
        if found.tell() + len(piece) > limit:
            raise _too_long(limit, where)
        found.write(piece)
    return found.getvalue()


def _too_long(limit: int, where: str) -> UserError:
    return UserError(
        f"{where}: has more than {limit >> 20:,} MiB, the most that is read; shorten it"
    )
