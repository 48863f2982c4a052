"""Interrupted recovery training: what is left, and that the same call resumes."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from lowlat.recovery import inputs as recovery_inputs
from lowlat.recovery import run as recovery_run
from lowlat.recovery import trained_attention
from lowlat.recovery import work_folder as work
from lowlat.recovery.work_folder import WorkFolder, work_folder_path
from lowlat.utils.errors import UserError
from tests import forked
from tests.unit.train.runs import stopped_after

from . import tiny


class Stopped:
    """A function of the recovery, counted, that raises `fault` in place of, or after, a call."""

    def __init__(
        self, patch: pytest.MonkeyPatch, name: str, at: int, fault: BaseException, *, late: bool
    ) -> None:
        self.calls = 0
        modules = {"build_tokens": recovery_inputs, "export_save": trained_attention}
        module = modules.get(name, recovery_run)
        self._real: Callable[..., Any] = getattr(module, name)
        self._at, self._fault, self._late = at, fault, late
        patch.setattr(module, name, self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self._at and not self._late:
            raise self._fault
        found = self._real(*arguments, **options)
        if self.calls == self._at:
            raise self._fault
        return found


STAGES = [
    ("build_tokens", 1, True),
    ("convert", 1, True),
    ("evaluate", 2, False),
    ("distill", 1, True),
    ("export_save", 1, True),
    ("convert", 2, True),
    ("report_files", 1, True),
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "at", "late"), STAGES)
def test_ctrl_c_and_on(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, at: int, late: bool
) -> None:
    """Around every stage: nothing under the destination's name, then the same bytes."""
    with monkeypatch.context() as patch:
        Stopped(patch, stage, at, KeyboardInterrupt(), late=late)
        with pytest.raises(KeyboardInterrupt):
            tiny.call(made, tmp_path / "mla")
    assert [path.name for path in tmp_path.iterdir()] == [".mla.conversion"]
    done = {path.name for path in work_folder_path(tmp_path / "mla").iterdir()}
    with monkeypatch.context() as patch:
        counts = {
            name: Stopped(patch, name, 0, KeyboardInterrupt(), late=True)
            for name in ("build_tokens", "convert", "distill", "evaluate")
        }
        tiny.call(made, tmp_path / "mla")
    assert counts["build_tokens"].calls == ("tokens" not in done)
    assert counts["convert"].calls == ("start" not in done) + ("out" not in done)
    assert counts["distill"].calls == ("recovery.json" not in done)
    names = ("original.json", "compressed.json", "recovered.json")
    assert counts["evaluate"].calls == sum(name not in done for name in names)
    assert tiny.contents(tmp_path / "mla") == tiny.contents(made / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["mla"]


@pytest.mark.slow
@pytest.mark.parametrize("is_renamed", [False, True])
def test_ctrl_c_around_the_last_renaming(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_renamed: bool
) -> None:
    """Before it the same call resumes; after it the model is there and nothing else stays."""
    dst, alone = tmp_path / "mla", {"tokens": None, "texts": ()}
    replace_file = work.replace_file

    def stop_before(path: Path, content: bytes) -> None:
        replace_file(path, content)
        if path.name == work.PLACED:
            raise KeyboardInterrupt

    def stop_after(_path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if is_renamed:
            patch.setattr(work, "sync_parent", stop_after)
        else:
            patch.setattr(work, "replace_file", stop_before)
        with pytest.raises(KeyboardInterrupt):
            tiny.call(made, dst, **alone)
    assert work_folder_path(dst).is_dir() and dst.exists() == is_renamed
    if is_renamed:
        with pytest.raises(UserError, match="exists already"):
            tiny.call(made, dst, **alone)
    else:
        tiny.call(made, dst, **alone)
    assert [path.name for path in tmp_path.iterdir()] == ["mla"]


@pytest.mark.slow
def test_a_stopped_training_resumes(made: Path, tmp_path: Path) -> None:
    """SIGINT in the middle of it: the step is finished and saved."""
    with stopped_after(2, signal.SIGINT):
        tiny.call(made, tmp_path / "mla")
    log = work_folder_path(tmp_path / "mla") / "run" / "log.jsonl"
    assert '"step":2' in log.read_text().replace(" ", "")
    tiny.call(made, tmp_path / "mla")
    assert tiny.contents(tmp_path / "mla") == tiny.contents(made / "whole")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"tokens": 640}, "recovery .it was 1280 tokens, now 640 tokens"),
        ({"share": 0.75}, "options .it was .*'cache': 0.5.*now .*'cache': 0.75"),
        ({"dtype": "bf16"}, "options .it was .*dtype auto.*now .*dtype bf16"),
        ({"experts": 4}, "options .it was .*now .*experts 4"),
        ({"calibrate": ()}, "options .it was .*'text': .*now .*'text'"),
        ({"evaluate": None}, "evaluation text .it was .*now none"),
        ({"texts": "calibrate.txt"}, "training text .it was .*heal.txt .*now .*calibrate.txt"),
    ],
)
def test_changed_options_are_named(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    what: str,
) -> None:
    with monkeypatch.context() as patch:
        Stopped(patch, "convert", 1, KeyboardInterrupt(), late=False)
        with pytest.raises(KeyboardInterrupt):
            tiny.call(made, tmp_path / "mla")
    if "texts" in changes:
        changes = {"texts": (str(made / changes["texts"]),)}
    with pytest.raises(UserError, match=f"unfinished conversion that differs in its {what}"):
        tiny.call(made, tmp_path / "mla", **changes)
    assert work_folder_path(tmp_path / "mla").is_dir()  # it may still be finished


def test_two_at_once(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nested(*arguments: Any, **options: Any) -> None:
        with pytest.raises(UserError, match="another process is writing it"):
            tiny.call(made, tmp_path / "mla")
        raise KeyboardInterrupt

    monkeypatch.setattr(recovery_inputs, "build_tokens", nested)
    with pytest.raises(KeyboardInterrupt):
        tiny.call(made, tmp_path / "mla")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "at"), [("evaluate", 2), ("distill", 1), ("export_save", 1)])
def test_a_full_disk(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, at: int
) -> None:
    with monkeypatch.context() as patch:
        Stopped(patch, stage, at, OSError(28, "No space left on device"), late=False)
        with pytest.raises(UserError, match=r"cannot be written \(No space left.*same command"):
            tiny.call(made, tmp_path / "mla")
    assert (work_folder_path(tmp_path / "mla") / "start").is_dir()
    tiny.call(made, tmp_path / "mla")
    assert tiny.contents(tmp_path / "mla") == tiny.contents(made / "whole")


@pytest.mark.slow
def test_a_disk_that_fills_while_attention_is_measured(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens stay, and are not made again."""
    with monkeypatch.context() as patch:
        fault = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr("lowlat.convert.compression.scratch.file_pieces", Mock(side_effect=fault))
        with pytest.raises(UserError, match=r"No space left.*repeat the command"):
            tiny.call(made, tmp_path / "mla")
    assert (work_folder_path(tmp_path / "mla") / "tokens").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(recovery_inputs, "build_tokens", Mock(side_effect=AssertionError))
        tiny.call(made, tmp_path / "mla")
    assert tiny.contents(tmp_path / "mla") == tiny.contents(made / "whole")


def test_a_disk_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(Path, "mkdir", Mock(side_effect=fault))
    with (
        pytest.raises(UserError, match=r"Read-only file system.; choose another destination$"),
        work.open_work_folder(tmp_path / "mla", {}),
    ):
        pass


@pytest.mark.slow
def test_a_destination_made_meanwhile(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays, and so does what was made."""

    def place(own: WorkFolder, *arguments: Any) -> None:
        (tmp_path / "mla").mkdir()
        real(own, *arguments)

    real = WorkFolder.place
    monkeypatch.setattr(work.WorkFolder, "place", place)
    with pytest.raises(UserError, match="exists already"):
        tiny.call(made, tmp_path / "mla")
    assert list((tmp_path / "mla").iterdir()) == []
    assert (work_folder_path(tmp_path / "mla") / "out" / "conversion.json").exists()


CHILD = """
import sys, time
from pathlib import Path
import pytest
from lowlat.train.run.trainer import Trainer
from tests.unit.recovery import tiny

def stopping(trainer):
    save(trainer)
    trainer._saves.wait()
    print("saved", flush=True)
    time.sleep(600)

save = Trainer._save
Trainer._save = stopping
tiny.scale_down(pytest.MonkeyPatch())
tiny.call(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_killed(made: Path, tmp_path: Path) -> None:
    """By SIGKILL, after the first save of the training."""
    arguments = [sys.executable, "-c", CHILD, str(made), str(tmp_path / "mla")]
    root = Path(__file__).parents[3]
    paths = f"{root}{os.pathsep}{root / 'tests'}"
    environment = os.environ | {"PYTHONPATH": paths}
    with forked.Popen(
        arguments, stdout=subprocess.PIPE, text=True, cwd=root, env=environment
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "saved\n"
        child.send_signal(signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == [".mla.conversion"]
    tiny.call(made, tmp_path / "mla")
    assert tiny.contents(tmp_path / "mla") == tiny.contents(made / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["mla"]
