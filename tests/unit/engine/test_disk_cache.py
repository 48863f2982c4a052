"""The prefix cache on disk: the same tokens cold and warm, damage of every kind, limits."""

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowlat.engine import page_writer, prefix_loader
from lowlat.engine.cache_fingerprint import fingerprint_of
from lowlat.engine.disk_budget import DiskBudget, on_disk
from lowlat.engine.engine import Engine
from lowlat.engine.page_folder import PageFolder
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.runner import ModelRunner
from lowlat.engine.scheduler import Limits
from lowlat.utils.errors import UserError
from tests.fakes import gqa_config, mla_config, tiny_model

from .disk_engines import (
    LIMIT,
    MODEL,
    NUM_PAGES,
    PAGE,
    PROMPT,
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


# The same tokens


@pytest.mark.parametrize("dtype", [None, torch.int8])
@pytest.mark.parametrize("model", [MODEL, tiny_model(gqa_config())], ids=["mla", "gqa"])
def test_tokens_are_equal_cold_in_memory_and_from_disk(
    tmp_path: Path, model: Any, dtype: torch.dtype | None
) -> None:
    first = disk_engine(tmp_path, model, cache_dtype=dtype)
    expected = outputs(first)
    assert outputs(first) == expected
    assert stats(first).hit_tokens == 0
    second = disk_engine(tmp_path, model, cache_dtype=dtype)
    assert outputs(second) == expected
    assert stats(second).hit_tokens == NUM_PAGES * PAGE
    if dtype is None:
        assert expected == cold(model=model)


def test_pages_read_from_disk_hold_the_bits_that_were_written(tmp_path: Path) -> None:
    first, second = disk_engine(tmp_path), disk_engine(tmp_path)
    outputs(first)
    outputs(second)
    for one, other in zip(first.runner.cache.layers, second.runner.cache.layers, strict=True):
        held = one[:NUM_PAGES]
        assert held.count_nonzero() > 0
        assert torch.equal(held, other[:NUM_PAGES])


@pytest.mark.parametrize("lost", range(NUM_PAGES))
def test_what_is_missing_is_computed(tmp_path: Path, lost: int) -> None:
    outputs(disk_engine(tmp_path))
    page_files(tmp_path)[lost].unlink()
    engine = disk_engine(tmp_path)
    assert outputs(engine) == EXPECTED
    assert stats(engine).hit_tokens == lost * PAGE
    assert len(page_files(tmp_path)) == 9


def test_a_request_reports_tokens_from_disk_as_cached(tmp_path: Path) -> None:
    outputs(disk_engine(tmp_path))
    engine = disk_engine(tmp_path)
    request = engine.add(PROMPT, TokenSamplingParams(max_tokens=2))
    run(engine)
    assert request.num_matched == NUM_PAGES * PAGE


def test_requests_that_share_a_prompt_read_it_once(tmp_path: Path) -> None:
    outputs(disk_engine(tmp_path))
    engine = disk_engine(tmp_path)
    requests = [
        engine.add(PROMPT, TokenSamplingParams(max_tokens=7, temperature=1.0, seed=3))
        for _ in range(3)
    ]
    run(engine)
    assert [request.sequences[0].tokens[len(PROMPT) :] for request in requests] == [EXPECTED] * 3
    assert stats(engine).hit_tokens == NUM_PAGES * PAGE


def test_others_decode_while_pages_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that is not in memory delays its own request only."""
    outputs(disk_engine(tmp_path))
    engine = disk_engine(tmp_path)
    other = engine.add([3, 1, 4], TokenSamplingParams(max_tokens=40))
    engine.step()
    monkeypatch.setattr(prefix_loader, "STALL_SECONDS", 1e9)
    read = PageFolder.read

    def only_waiting(self: PageFolder, *args: Any, may_wait: bool) -> str:
        return read(self, *args, may_wait=True) if may_wait else "pending"

    monkeypatch.setattr(PageFolder, "read", only_waiting)
    request = engine.add(PROMPT, TokenSamplingParams(max_tokens=7, temperature=1.0, seed=3))
    while other.sequences[0].finish_reason is None:
        engine.step()
        engine.check_integrity()
    assert other.sequences[0].num_outputs == 40
    assert request.started_at is None
    run(engine)
    assert request.sequences[0].tokens[len(PROMPT) :] == EXPECTED
    assert stats(engine).hit_tokens == NUM_PAGES * PAGE


def test_a_request_that_ends_while_it_loads_releases_its_pages(tmp_path: Path) -> None:
    outputs(disk_engine(tmp_path))
    engine = disk_engine(tmp_path)
    request = engine.add(PROMPT, TokenSamplingParams(max_tokens=7))
    assert engine.step() == []
    assert engine.scheduler.loading == request.sequences
    engine.abort(request.id)
    engine.check_integrity()
    assert not engine.has_work
    assert engine.runner.allocator.num_used == 0


def test_a_loading_request_gives_its_pages_to_running_ones(tmp_path: Path) -> None:
    """Pages run out while a request loads; it is preempted, and its tokens stay the same."""
    outputs(disk_engine(tmp_path))
    engine = disk_engine(tmp_path, limits=Limits(max_pages=12))
    other = engine.add([3, 1, 4], TokenSamplingParams(max_tokens=45, ignore_eos=True))
    engine.step()
    requests = [
        engine.add(PROMPT, TokenSamplingParams(max_tokens=7, temperature=1.0, seed=3))
        for _ in range(2)
    ]
    run(engine)
    assert other.sequences[0].num_outputs == 45
    for request in requests:
        assert request.sequences[0].tokens[len(PROMPT) :] == EXPECTED


def test_two_engines_share_a_folder_at_once(tmp_path: Path) -> None:
    one, other = disk_engine(tmp_path), disk_engine(tmp_path)
    prompts = [[first, *PROMPT] for first in range(4)]
    expected = [cold(prompt) for prompt in prompts]
    for engine in (one, other, other, one):
        assert [outputs(engine, prompt) for prompt in prompts] == expected
    assert stats(other).written_bytes == 0
    assert stats(other).hit_tokens >= 4 * NUM_PAGES * PAGE
    assert len(page_files(tmp_path)) == 4 * 10


def test_generated_tokens_are_stored_too(tmp_path: Path) -> None:
    """A preempted request finds its own output on disk when memory has forgotten it."""
    outputs(disk_engine(tmp_path), max_tokens=12)
    assert len(page_files(tmp_path)) == (len(PROMPT) + 11) // PAGE


# What does not fit


def test_namespaces_share_nothing(tmp_path: Path) -> None:
    outputs(disk_engine(tmp_path), namespace=b"one key")
    engine = disk_engine(tmp_path)
    assert outputs(engine, namespace=b"another key") == EXPECTED
    assert stats(engine).hit_tokens == 0
    (model,) = (path for path in tmp_path.iterdir() if path.is_dir())
    names = [path.name for path in model.iterdir()]
    assert len(names) == 2
    assert not any(b"key".hex() in name for name in names)


def changed_weight() -> Any:
    model = tiny_model(mla_config())
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[3, 2] += 1e-3  # pyright: ignore
    return model


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (changed_weight(), {}),
        (MODEL, {"cache_dtype": torch.int8}),
        (MODEL, {"page_size": 7}),
        (MODEL, {"prefill_chunk": 35}),
        (tiny_model(mla_config(rms_norm_eps=1e-3)), {}),
        (tiny_model(mla_config(), torch.float32), {}),
    ],
    ids=["weight", "cache dtype", "page size", "chunk", "config", "dtype"],
)
def test_other_models_have_other_fingerprints(
    tmp_path: Path, model: Any, options: dict[str, Any]
) -> None:
    outputs(disk_engine(tmp_path))
    engine = disk_engine(tmp_path, model, **options)
    outputs(engine)
    assert stats(engine).hit_tokens == 0
    assert len({path.parent.parent for path in page_files(tmp_path)}) == 2


def test_the_fingerprint_has_the_kernels_and_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ModelRunner(MODEL, page_size=PAGE)
    same = fingerprint_of(runner, context=97)
    assert fingerprint_of(ModelRunner(MODEL, page_size=PAGE), context=97) == same
    for name in ("version", "_code_digest", "_torch_facts"):
        with monkeypatch.context() as patch:
            patch.setattr(f"lowlat.engine.cache_fingerprint.{name}", lambda *args: "something else")
            assert fingerprint_of(runner, context=97) != same


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
