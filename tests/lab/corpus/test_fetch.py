"""Archives through npm, apt-get and pip: fetched once, checked, never run."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from lowlat_lab.corpus import tools
from lowlat_lab.corpus.fetch import Archive, fetch_archive
from lowlat_lab.corpus.recipe import Source

from lowlat.utils.errors import UserError
from lowlat.utils.progress import SilentProgress

from .builders import make_deb, make_source, make_tgz, make_wheel

FILES = {"a.txt": b"text " * 307}
PROGRESS = SilentProgress()


def fetched(source: Source, *, accept_newer: bool = False) -> Archive:
    return fetch_archive(source, accept_newer=accept_newer, progress=PROGRESS)


def npm_source(shelf: Path, **fields: object) -> Source:
    return make_source(make_tgz(shelf / "a-b-1.0.tgz", FILES), "npm:@a/b==1.0", **fields)


def test_npm_is_asked_once_then_the_cache(shelf: Path, tmp_path: Path) -> None:
    source = npm_source(shelf)
    first = fetched(source)
    assert first.path == tmp_path / "cache/packages/npm/@a/b/1.0/a-b-1.0.tgz"
    assert first.sha256 == source.sha256
    (shelf / "a-b-1.0.tgz").unlink()
    assert fetched(source) == first
    assert not list((tmp_path / "cache/packages/npm/.work").glob("*/"))


def test_a_wheel_comes_through_pip(shelf: Path) -> None:
    metadata = b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
    name = "tiny-1.0-py3-none-any.whl"
    info = {
        "tiny-1.0.dist-info/METADATA": metadata,
        "tiny-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n",
        "tiny-1.0.dist-info/RECORD": b"",
    }
    source = make_source(make_wheel(shelf / name, {**FILES, **info}), "pypi:tiny==1.0")
    assert fetched(source).path.name == name


def test_an_sdist_is_fetched_and_its_setup_is_never_run(shelf: Path, tmp_path: Path) -> None:
    """Regression: `pip download` of a source archive runs its setup.py."""
    mark = tmp_path / "setup-ran"
    setup = f"open({str(mark)!r}, 'w')\nfrom setuptools import setup\nsetup(name='tiny')"
    files = {"tiny-1.0/setup.py": setup.encode(), "tiny-1.0/a.txt": b"text"}
    make_tgz(shelf / "tiny-0.9.tar.gz", files)
    source = make_source(make_tgz(shelf / "tiny-1.0.tar.gz", files), "pypi:tiny==1.0", sdist=True)
    assert fetched(source).path.name == "tiny-1.0.tar.gz"
    assert not mark.exists()


def test_a_version_that_debian_replaced(shelf: Path) -> None:
    """The recipe's version fails with the remedy; --accept-newer takes the one there is."""
    path = make_deb(shelf / "doc_1.2_all.deb", FILES)
    source = make_source(path, "debian:doc==1.1", sha256="0" * 64)
    with pytest.raises(UserError, match=r"Version '1\.1' for 'doc' was not found'.*--accept-newer"):
        fetched(source)
    newer = fetched(source, accept_newer=True)
    assert newer.path.name == "doc_1.2_all.deb"
    assert newer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_exact_version_is_requested_from_debian(shelf: Path) -> None:
    source = make_source(make_deb(shelf / "doc_1.1_all.deb", FILES), "debian:doc==1.1")
    make_deb(shelf / "doc_1.2_all.deb", {"b.txt": b"other"})
    assert fetched(source, accept_newer=True).path.name == "doc_1.1_all.deb"


def test_another_archive_than_meant_is_not_kept(shelf: Path, tmp_path: Path) -> None:
    source = npm_source(shelf, sha256="1" * 64)
    with pytest.raises(UserError, match=r"is not the archive of the recipe: sha256 expected 1+"):
        fetched(source)
    assert not list((tmp_path / "cache").rglob("*.tgz"))


def test_an_archive_changed_in_the_cache_is_found(shelf: Path) -> None:
    source = npm_source(shelf)
    archive = fetched(source)
    data = bytearray(archive.path.read_bytes())
    data[17] ^= 1
    archive.path.write_bytes(data)
    with pytest.raises(UserError, match="delete it to fetch it again"):
        fetched(source)


def test_what_npm_says_is_one_line_with_a_remedy(shelf: Path) -> None:
    source = npm_source(shelf)
    (shelf / "a-b-1.0.tgz").unlink()
    with pytest.raises(UserError, match=r"'404 Not Found'; .*npm's settings.*--without tiny$"):
        fetched(source)


def test_a_tool_that_is_not_there(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"needs npm, which is not on this machine.*--without tiny"):
        fetched(npm_source(shelf))


def test_a_full_disk_is_said(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = (1, "write failed: No space left on device")
    monkeypatch.setattr(tools, "run_pip", lambda command, env, watch: full)
    with pytest.raises(UserError, match="no space left on the disk of"):
        fetched(npm_source(shelf))


def test_progress_reports_each_byte_once(shelf: Path) -> None:
    class Counting:
        shown = True
        done = 0

        def task(self, label: str, total: int | None = None, unit: str = "items") -> "Counting":
            return self

        def __enter__(self) -> "Counting":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def advance(self, n: int = 1) -> None:
            self.done += n

    counting, source = Counting(), npm_source(shelf)
    fetch_archive(source, accept_newer=False, progress=counting)
    assert counting.done == source.bytes


@pytest.mark.network
def test_each_registry_gives_what_the_shipped_recipe_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One small archive through each of pip, npm and apt-get, as they are set up here."""
    from .test_recipe import SHIPPED, read_corpus_recipe

    if "LOWLAT_CACHE" not in os.environ:
        monkeypatch.setenv("LOWLAT_CACHE", str(tmp_path))
    chosen = {"shakespeare", "moby-dick"}
    if shutil.which("apt-get"):
        chosen.add("devils-dictionary")
    for source in read_corpus_recipe(SHIPPED).source:
        if source.name in chosen:
            assert fetched(source).sha256 == source.sha256
