"""A disk that is really full, and a file that may really not grow: saves fail, nothing is lost."""

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowlat.train.checkpoints import writer
from lowlat.train.checkpoints.errors import CheckpointWriteError
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.checkpoints.store import CheckpointStore

from .states import assert_is, facts, make_run, saves_in, state
from .tracing import Tracer, in_child, nothing
from .training import (
    STEPS,
    TrainServer,
    compare,
    latest,
    logged_step,
    make_tokens,
    write_recipe,
)

BIG = [("big", torch.zeros(1 << 20))]
"""4 MiB, more than the disk of the tests has."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2,204 KiB, on which a third save of `training`'s model does not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2204k", "none", str(disk)]
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def unforeseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks beforehand whether there is room, as where a quota is what ends it."""
    monkeypatch.setattr(writer, "require_free_space", lambda saves, step, tensors: None)


def test_a_save_that_does_not_fit_is_not_begun(small_disk: Path) -> None:
    """Regression: a save that fills the disk, so that the log next to it fails and ends the run."""
    with RunFolder(make_run(small_disk / "run", 1, 2)) as run:
        saves = saves_in(run)
        error = (
            r"step 3: needs 5.2 MB, but the disk of .* has 2.\d MB left; free .* is that of step 2"
        )
        with (
            Tracer(run.checkpoints, nothing) as tracer,
            pytest.raises(CheckpointWriteError, match=error),
        ):
            saves.write(3, BIG, {})
        assert not {"mkdir", "open", "write"} & {done.name for done in tracer.operations}
        assert_is(saves.latest(), 2)


def test_a_full_disk(small_disk: Path, unforeseen: None) -> None:
    """The part that did not fit is removed at once, so that what fits can be saved again."""
    reports: list[str] = []
    with RunFolder(make_run(small_disk / "run", 1, 2)) as run:
        saves = saves_in(run, reports.append)
        with pytest.raises(
            CheckpointWriteError, match=r"step 3: .*disk of .* is full; .*newest is .* step 2"
        ):
            saves.write(3, BIG, {})
        for step in (4, 5):
            saves.write_async(step, BIG, {})
        saves.wait()
        assert [line.split(":")[0] for line in reports] == [
            "checkpoint of step 4",
            "checkpoint of step 5",
        ]
        assert_is(saves.latest(), 2)
        saves.write(6, state(6), facts(6))
        assert_is(saves.latest(), 6)


def test_a_disk_without_a_byte_left(small_disk: Path, unforeseen: None) -> None:
    """Even a folder or a few bytes of JSON may not fit; every stage of a save meets the end."""
    with RunFolder(make_run(small_disk / "run", 1, 2)) as run:
        saves = saves_in(run)
        filler = small_disk / "filler"
        failed = 0
        for free in range(0, 12):
            filler.unlink(missing_ok=True)
            fill(filler, free * 4096)
            try:
                saves.write(10 + free, state(10 + free), facts(10 + free))
            except CheckpointWriteError as error:
                failed += 1
                assert "is full; free some space" in str(error)
            newest = saves.steps()[-1]
            assert_is(saves.latest(), newest)
            assert all(not entry.name.startswith(".") for entry in run.checkpoints.iterdir())
        assert 2 <= failed < 12


def fill(path: Path, leave: int) -> None:
    """A file that takes all space of its disk but `leave` bytes."""
    status = os.statvfs(path.parent)
    with path.open("wb") as file:
        file.write(bytes(max(0, status.f_bavail * status.f_bsize - leave)))


def test_a_limit_of_file_sizes(tmp_path: Path) -> None:
    """For machines where no small disk can be mounted; set in a process of its own."""
    path = make_run(tmp_path / "run", 1, 2)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        with RunFolder(path) as run:
            saves = saves_in(run)
            with pytest.raises(
                CheckpointWriteError, match=r"would exceed the largest file allowed; raise"
            ):
                saves.write(3, BIG, {})
            assert_is(saves.latest(), 2)
            saves.write(4, state(4), facts(4))
            assert_is(saves.latest(), 4)

    assert in_child(work) == 0
    with RunFolder(path) as run:
        assert_is(saves_in(run).latest(), 4)


@pytest.mark.slow
def test_training_continues(small_disk: Path, tmp_path: Path) -> None:
    """A run whose saves do not fit any more trains to its end, says what it could not save, and
    goes on from its last save, bit for bit, once there is room.
    """
    make_tokens(tmp_path / "tokens")
    recipe = write_recipe(tmp_path / "recipe.toml", optimizer="adamw", keep_last=2)
    folder = small_disk / "run"
    server = TrainServer()
    try:
        server.run(recipe, tmp_path / "undisturbed")
        assert server.status() == 0
        server.run(recipe, folder)
        assert server.status() == 1
        assert logged_step(folder) == STEPS
        assert len(CheckpointStore(RunFolder(folder), report=pytest.fail).steps()) == 2
        notes = [
            line for line in (folder / "log.jsonl").read_text().split("\n") if "left; free" in line
        ]
        assert len(notes) > 10
        subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
        server.run(recipe, folder)
        assert server.status() == 0
    finally:
        server.close()
    expected = latest(tmp_path / "undisturbed")
    assert expected is not None
    compare(latest(folder), expected)
