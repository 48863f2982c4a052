"""The files of the prefix cache on disk: damage of every kind, limits, permissions."""

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowlat.engine import page_writer
from lowlat.engine.disk_budget import DiskBudget, on_disk
from lowlat.engine.engine import Engine
from lowlat.engine.params import TokenSamplingParams
from lowlat.utils.errors import UserError

from .disk_engines import (
    LIMIT,
    MODEL,
    NUM_PAGES,
    PAGE,
    PROMPT,
    changed_weight,
    cold,
    disk_engine,
    flush,
    folders,
    outputs,
    page_files,
    run,
    stats,
)

EXPECTED = cold()


def file_bytes(folder: Path) -> int:
    return page_files(folder)[0].stat().st_size


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def other_page(path: Path) -> None:
    """The file of another page under this page's name."""
    other = next(each for each in sorted(path.parent.iterdir()) if each != path)
    shutil.copyfile(other, path)


def swap_payload(path: Path) -> None:
    """This page's header over another's entries, with its checksum."""
    other = next(each for each in sorted(path.parent.iterdir()) if each != path)
    head = path.read_bytes()[:200]
    path.write_bytes(head + other.read_bytes()[200:])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: os.truncate(path, 0), "truncated"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "truncated"),
        (lambda path: path.write_bytes(b"\0" * path.stat().st_size), "foreign"),
        (lambda path: flip(path, 0), "foreign"),
        (lambda path: flip(path, 180), "foreign"),
        (lambda path: flip(path, -1), "corrupt"),
        (lambda path: flip(path, -1000), "corrupt"),
        (other_page, "foreign"),
        (swap_payload, "corrupt"),
        (replace_by_folder, "unreadable"),
    ],
    ids=[
        "empty", "short", "long", "zeros", "magic", "tokens", "last byte", "entry", "replayed",
        "swapped", "folder",
    ],
)  # fmt: skip
def test_damage_is_detected_and_the_page_is_computed(
    tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    outputs(disk_engine(tmp_path))
    victim = page_files(tmp_path)[3]
    damage(victim)
    engine = disk_engine(tmp_path)
    assert outputs(engine) == EXPECTED
    assert stats(engine).dropped == {reason: 1}
    assert stats(engine).hit_tokens == 3 * PAGE
    if reason != "unreadable":
        again = disk_engine(tmp_path)
        assert outputs(again) == EXPECTED
        assert stats(again).hit_tokens == NUM_PAGES * PAGE


@pytest.mark.parametrize("place", ["model", "namespace"])
def test_files_moved_from_another_place_are_dropped(tmp_path: Path, place: str) -> None:
    """Replayed records: the same key under another fingerprint, other tokens' namespace."""
    other = changed_weight() if place == "model" else MODEL
    outputs(disk_engine(tmp_path / "a", other), namespace=b"x")
    outputs(disk_engine(tmp_path / "b"), namespace=b"x")
    sources, targets = page_files(tmp_path / "a"), page_files(tmp_path / "b")
    if place == "namespace":
        shutil.rmtree(tmp_path / "a")
        outputs(disk_engine(tmp_path / "a"), namespace=b"y")
        sources = page_files(tmp_path / "a")
    for source, target in zip(sources, targets, strict=True):
        shutil.copyfile(source, target)
    engine = disk_engine(tmp_path / "b")
    assert outputs(engine, namespace=b"x") == EXPECTED
    assert stats(engine).dropped == {"foreign": 1}
    assert stats(engine).hit_tokens == 0


def test_pages_with_bad_values_are_removed(tmp_path: Path) -> None:
    engine = disk_engine(tmp_path)
    outputs(engine)
    assert engine.prefix is not None and engine.disk is not None
    pages = engine.prefix.match(b"", PROMPT[:40], ["expanded"] * 8)
    engine.runner.allocator.release(pages)
    number = len(pages)
    if number == 0:  # the prompt is short enough for another path
        pages = list(range(NUM_PAGES))
    engine.disk.withdraw(engine.prefix.withdraw(pages[:1]))
    flush(engine)
    assert page_files(tmp_path) == []


# Limits and failures


def test_a_full_disk_is_not_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def full(descriptor: int, data: Any) -> int:
        if len(data) > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    engine = disk_engine(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert outputs(engine) == EXPECTED
    assert page_files(tmp_path) == []
    assert list(tmp_path.rglob("*.partial")) == []
    assert set(stats(engine).dropped) == {"disk_full"}
    assert stats(engine).written_bytes == 0
    monkeypatch.setattr(page_writer, "PAUSE_SECONDS", 0.0)
    later = disk_engine(tmp_path)
    assert outputs(later) == EXPECTED
    assert len(page_files(tmp_path)) == 9


def test_the_limit_holds_and_the_least_recently_used_page_goes_first(tmp_path: Path) -> None:
    engine = disk_engine(tmp_path)
    outputs(engine)
    size = on_disk(file_bytes(tmp_path))
    limit = 27 * size
    shutil.rmtree(tmp_path)
    engine = disk_engine(tmp_path, max_bytes=limit)
    prompts = [[first, *PROMPT] for first in range(9)]
    for number, prompt in enumerate(prompts):
        assert outputs(engine, prompt) == cold(prompt)
        assert sum(on_disk(each.stat().st_size) for each in page_files(tmp_path)) <= limit
        if number > 0:  # the first prompt stays in use
            time.sleep(0.01)
            assert engine.disk is not None
            engine.disk._touched.clear()  # pyright: ignore[reportPrivateUsage]
            outputs(engine, prompts[0])
    assert stats(engine).evicted_bytes > 0
    again = disk_engine(tmp_path, max_bytes=limit)
    assert outputs(again, prompts[0]) == cold(prompts[0])
    assert stats(again).hit_tokens == NUM_PAGES * PAGE
    assert outputs(again, prompts[1]) == cold(prompts[1])
    assert stats(again).hit_tokens == NUM_PAGES * PAGE


def test_the_limit_counts_the_files_of_all_engines(tmp_path: Path) -> None:
    outputs(disk_engine(tmp_path))
    limit = 12 * on_disk(file_bytes(tmp_path))
    engines = [disk_engine(tmp_path, max_bytes=limit), disk_engine(tmp_path, max_bytes=limit)]
    for first in range(6):
        outputs(engines[first % 2], [first, *PROMPT])
        assert sum(on_disk(each.stat().st_size) for each in page_files(tmp_path)) <= limit


def test_a_count_corrects_the_usage_and_removes_abandoned_files(tmp_path: Path) -> None:
    outputs(disk_engine(tmp_path))
    files = page_files(tmp_path)
    partial = files[0].with_name(f"{files[0].name}.17-4.partial")
    partial.write_bytes(b"half")
    os.utime(partial, (0, 0))
    unknown = files[0].with_name("mine.txt")
    unknown.write_text("not a page")
    (tmp_path / "usage").write_bytes(b"rubbish")
    budget = DiskBudget(tmp_path, LIMIT)
    assert budget.count() == 0
    assert int((tmp_path / "usage").read_bytes()) == sum(
        on_disk(each.stat().st_size) for each in files
    )
    assert not partial.exists()
    assert DiskBudget(tmp_path, 0).count() > 0
    assert page_files(tmp_path) == []
    assert unknown.exists()


def test_folders_and_files_are_private(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        outputs(disk_engine(tmp_path / "new"))
    finally:
        os.umask(previous)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders(tmp_path / "new")} == {0o700}
    files = [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(UserError, match="chmod 700"):
        disk_engine(tmp_path)


def test_a_limit_below_two_pages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="less than two"):
        disk_engine(tmp_path, max_bytes=4096)


def test_a_file_as_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="prefix_cache_dir"):
        disk_engine(tmp_path / "file")


def test_pages_wait_for_buffers_and_are_all_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_writer, "BUFFER_BYTES", 0)
    engine: Engine = disk_engine(tmp_path)
    assert outputs(engine) == EXPECTED
    assert len(page_files(tmp_path)) == 9


def test_close_writes_what_waits_and_ends_the_thread(tmp_path: Path) -> None:
    engine = disk_engine(tmp_path)
    engine.add(PROMPT, TokenSamplingParams(max_tokens=1))
    run(engine)
    engine.close()
    engine.close()
    assert len(page_files(tmp_path)) == NUM_PAGES
