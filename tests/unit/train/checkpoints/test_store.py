"""Checkpoint store: writes read back, on a thread too; failures are reported and do no harm."""

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lowlat.train.checkpoints import writer
from lowlat.train.checkpoints.errors import CheckpointWriteError
from lowlat.train.checkpoints.manifest import read_manifest
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.checkpoints.store import CheckpointStore
from lowlat.utils.errors import UserError
from tests.train_faults.states import assert_is, facts, saves_in, state

Report = list[str]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder(tmp_path / "run") as run:
        yield run


@pytest.fixture
def reports() -> Report:
    return []


@pytest.fixture
def saves(run: RunFolder, reports: Report) -> CheckpointStore:
    return saves_in(run, reports.append)


def write(saves: CheckpointStore, *steps: int) -> None:
    for step in steps:
        saves.write(step, state(step), facts(step))


def test_nothing_saved(saves: CheckpointStore, reports: Report) -> None:
    assert saves.latest() is None
    saves.poll()
    saves.close()
    assert saves.steps() == [] and reports == []


def test_round_trip(saves: CheckpointStore, run: RunFolder, reports: Report) -> None:
    assert saves.write(3, state(3), facts(3)) == run.checkpoints / "step-00000003"
    assert_is(saves.latest(), 3)
    assert_is(saves.open(3), 3)
    write(saves, 123_456_789)
    save = saves.latest()
    assert save is not None and save.step == 123_456_789
    assert read_manifest(save.folder).time == 1000.0
    with pytest.raises(UserError, match="step-123456789: has no tensor 'missing'"):
        save.tensor("missing")
    assert reports == []


def test_files_are_readable_elsewhere(saves: CheckpointStore, run: RunFolder) -> None:
    """Plain safetensors and JSON, and the digest of each file is that of its bytes."""
    write(saves, 3)
    folder = run.checkpoints / "step-00000003"
    with safe_open(folder / "state.safetensors", "pt") as file:
        for name, tensor in state(3):
            assert torch.equal(file.get_tensor(name), tensor)
    assert json.loads((folder / "facts.json").read_text()) == facts(3)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, record in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert record["size"] == len(content)
        assert record["sha256"] == hashlib.sha256(content).hexdigest()


def test_tensors_are_mapped_and_private(saves: CheckpointStore) -> None:
    """Every dtype is aligned whatever was saved before it; writing to a tensor changes no file."""
    tensors = {
        "one": torch.arange(3, dtype=torch.uint8),
        "two": torch.arange(5, dtype=torch.bfloat16),
        "eight": torch.arange(7, dtype=torch.float64),
        "scalar": torch.tensor(2.5),
        "flag": torch.tensor([True]),
    }
    saves.write(1, tensors.items(), {})
    save = saves.latest()
    assert save is not None
    for name, expected in tensors.items():
        found = save.tensor(name)
        assert torch.equal(found, expected) and found.dtype == expected.dtype
        assert found.data_ptr() == save.tensor(name).data_ptr()
        found.fill_(0)
    again = saves.latest()
    assert again is not None and torch.equal(again.tensor("eight"), tensors["eight"])


def test_large_tensors_are_hashed_and_written_in_pieces(
    saves: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowlat.utils.atomic_files.CHUNK", 7)
    write(saves, 1)
    assert_is(saves.latest(), 1)


@pytest.mark.parametrize(
    ("tensors", "facts", "error"),
    [
        ([("x", torch.ones(1)), ("x", torch.ones(1))], {}, "comes twice"),
        ([], {"rate": float("nan")}, "JSON"),
    ],
)
def test_mistakes_of_the_caller(
    saves: CheckpointStore, tensors: list, facts: dict, error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        saves.write(1, tensors, facts)
    assert list(saves.folder.iterdir()) == []


def test_a_step_is_saved_once(saves: CheckpointStore) -> None:
    write(saves, 1)
    with pytest.raises(CheckpointWriteError, match=r"step 1: .*step-00000001 exists already"):
        saves.write(1, state(1), facts(1))
    assert_is(saves.latest(), 1)


def test_retention(run: RunFolder, reports: Report) -> None:
    """By count and by time; a save that is visibly broken counts for nothing and is not touched."""
    now = 0.0
    saves = CheckpointStore(
        run, report=reports.append, keep_every=timedelta(hours=1), clock=lambda: now
    )
    for step in range(1, 9):
        write(saves, step)
        if step == 3:
            (run.checkpoints / "step-00000002" / "facts.json").unlink()
        now += 1500.0  # 25 minutes
    assert saves.steps() == [1, 2, 4, 7, 8]
    assert reports == []


def test_an_old_save_that_cannot_be_removed(
    saves: CheckpointStore, reports: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told, no failure of the new save, and made good after the next."""

    def refuse(path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    write(saves, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        write(saves, 3)
    assert (
        len(reports) == 1
        and "an old checkpoint cannot be removed (Permission denied)" in reports[0]
    )
    assert saves.steps() == [2, 3]
    write(saves, 4)
    assert sorted(entry.name for entry in saves.folder.iterdir()) == [
        "step-00000003",
        "step-00000004",
    ]


# On a thread


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Parts are written only once it is set."""
    gate, real = threading.Event(), writer.write_safetensors

    def slow(*arguments: object) -> object:
        assert gate.wait(600)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "write_safetensors", slow)
    return gate


def test_training_continues_meanwhile(saves: CheckpointStore, gate: threading.Event) -> None:
    """Facts are taken at once; `poll` never waits, `close` does."""
    changing = facts(1)
    saves.write_async(1, state(1), changing)
    changing.clear()
    saves.poll()
    assert saves.steps() == []
    gate.set()
    saves.close()
    assert_is(saves.latest(), 1)


def test_one_write_at_a_time(saves: CheckpointStore, gate: threading.Event) -> None:
    saves.write_async(1, state(1), facts(1))
    threading.Timer(0.2, gate.set).start()
    saves.write_async(2, state(2), facts(2))
    assert saves.steps()[0] == 1
    saves.write_async(3, state(3), facts(3))
    write(saves, 4)
    assert saves.steps() == [3, 4]
    saves.close()


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether the disk is full."""
    real, state = os.write, {"full": False}

    def fail(descriptor: int, data: bytes) -> int:
        if state["full"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", fail)
    return lambda value: state.update(full=value)


def test_a_full_disk_does_not_stop_training(
    saves: CheckpointStore, reports: Report, full: Callable[[bool], None]
) -> None:
    """Each failed save is one line, the next is tried; what was there stays whole."""
    write(saves, 1)
    full(True)
    for step in (2, 3):
        saves.write_async(step, state(step), facts(step))
        saves.wait()
    assert reports == [
        f"checkpoint of step {step}: cannot be written, the disk of {saves.folder} is full; free "
        "some space there; the newest is that of step 1; training continues and the next "
        "checkpoint is tried as usual"
        for step in (2, 3)
    ]
    assert [entry.name for entry in saves.folder.iterdir()] == ["step-00000001"]
    full(False)
    saves.write_async(4, state(4), facts(4))
    saves.close()
    assert_is(saves.latest(), 4)
    assert saves.steps() == [1, 4]


def test_a_failure_is_reported_by_the_next_call(
    saves: CheckpointStore, reports: Report, full: Callable[[bool], None]
) -> None:
    """By `write_async` too, which begins its own save all the same, in the caller's thread."""
    full(True)
    saves.write_async(1, state(1), facts(1))
    assert saves._pending is not None and saves._pending.exception() is not None
    assert reports == []
    full(False)
    saves.write_async(2, state(2), facts(2))
    assert len(reports) == 1 and "checkpoint of step 1: cannot be written" in reports[0]
    assert "there is none yet" in reports[0]
    saves.close()
    assert_is(saves.latest(), 2)


def test_a_run_does_not_end_well_without_its_last_save(
    saves: CheckpointStore, full: Callable[[bool], None]
) -> None:
    write(saves, 1)
    full(True)
    saves.write_async(2, state(2), facts(2))
    with pytest.raises(
        CheckpointWriteError, match=r"step 2: .* is full; .* newest is that of step 1"
    ):
        saves.close()
    assert_is(saves.latest(), 1)


def test_other_errors_of_the_thread_are_raised(
    saves: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a mistake in the code that looks like a full disk."""

    def wrong(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(writer, "write_safetensors", wrong)
    saves.write_async(1, state(1), facts(1))
    with pytest.raises(ZeroDivisionError):
        saves.wait()
    saves.close()
