"""Cache of package archives: downloaded once, verified, reused offline.

    CACHE/packages/KIND/NAME/VERSION/ARCHIVE    a complete archive
    CACHE/packages/KIND/.work/NAME-VERSION/     a running download, with a lock file next to it

`corpus.tools` calls the package tools; `corpus.archive` reads the archives.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lowlat.checkpoint.fetch.cache_dir import (
    cache_dir,
    cache_disk_errors,
    checked_digest,
    locked,
    sha256_file,
    write_record,
)
from lowlat.utils.atomic_files import sync_folder
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, Task
from lowlat_lab.corpus.recipe import Source
from lowlat_lab.corpus.tools import download

SUFFIXES = {"npm": (".tgz",), "debian": (".deb",), "pypi": (".whl",)}
SDIST_SUFFIXES = (".tar.gz", ".tar.bz2", ".zip")
NEWEST = "newest"
"""Folder of a Debian package's current version, which the recipe does not name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """An archive in the cache, and its sha256."""

    path: Path
    sha256: str


def fetch_archive(source: Source, *, accept_newer: bool, progress: Progress) -> Archive:
    """The archive of a source, cached and verified by its sha256.

    accept_newer: if the version of a Debian package is gone, take the current one, whose signature
    apt-get verifies. Raises UserError for a missing tool or version, no network, a wrong hash or a
    full disk.
    """
    with cache_disk_errors(cache_dir()):
        try:
            return _cached(source, source.version, progress)
        except VersionGone:
            if not accept_newer:
                raise
            return _cached(source, NEWEST, progress)


class VersionGone(UserError):
    """Debian no longer offers the version."""


def _cached(source: Source, version: str, progress: Progress) -> Archive:
    """The archive of `version`, downloaded if it is not in the cache."""
    base = cache_dir() / "packages" / source.kind
    folder = base.joinpath(*source.package_name.split("/"), version.replace(":", "%3a"))
    if _archive_in(folder, source) is None:
        name = re.sub(r"[^A-Za-z0-9._-]", "-", folder.relative_to(base).as_posix())
        work = base / ".work" / name
        work.mkdir(parents=True, exist_ok=True)
        with locked(work.with_name(work.name + ".lock"), source.name, progress):
            if _archive_in(folder, source) is None:  # another process may have fetched it
                _fetch(source, folder, work, progress)
    archive = _archive_in(folder, source)
    assert archive is not None
    expected = None if version == NEWEST else source.sha256
    return Archive(path=archive, sha256=checked_digest(archive, expected, progress))


def _archive_in(folder: Path, source: Source) -> Path | None:
    """The archive in `folder` with a suffix of the source's kind, if any."""
    suffixes = SDIST_SUFFIXES if source.sdist else SUFFIXES[source.kind]
    found = [path for path in sorted(folder.glob("*")) if path.name.endswith(suffixes)]
    return found[0] if found else None


def _fetch(source: Source, folder: Path, work: Path, progress: Progress) -> None:
    """Download into `work`, verify, and rename the archive into `folder`."""
    newest = folder.name == NEWEST
    try:
        with progress.task(f"downloading {source.name}", source.bytes, "bytes") as task:
            watch = _growth(work, task)
            try:
                download(source, work, watch, newest=newest)
            except UserError as error:
                if source.kind == "debian" and re.search(r"Version .* was not found", str(error)):
                    raise VersionGone(str(error)) from error
                raise
            watch()
        archive = _archive_in(work, source)
        if archive is None:
            raise UserError(f"cannot fetch {source.package}: its tool downloaded no archive")
        digest = sha256_file(archive)
        if not newest and digest != source.sha256:
            raise UserError(
                f"{source.package} is not the archive of the recipe: sha256 expected "
                f"{source.sha256}, got {digest}; do not use it unless you know why it differs"
            )
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / archive.name
        write_record(target, archive.stat(), digest)
        os.replace(archive, target)
        sync_folder(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _growth(work: Path, task: Task) -> Callable[[], None]:
    """A function that advances `task` by the growth of the largest file below `work`."""
    seen = 0

    def watch() -> None:
        nonlocal seen
        now = 0
        for path in work.rglob("*"):
            try:
                now = max(now, path.stat().st_size)
            except FileNotFoundError:  # moved meanwhile
                continue
        task.advance(max(0, now - seen))
        seen = max(seen, now)

    return watch
