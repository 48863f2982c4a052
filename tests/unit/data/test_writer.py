"""Writing: a folder is whole or not there, whatever happens on the way."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lowlat.data.dataset import TokenizedDataset
from lowlat.data.writer import SplitWriter
from lowlat.utils.atomic_files import atomic_folder
from lowlat.utils.errors import UserError
from tests import forked

from .conftest import END, Make


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    for fault in (KeyboardInterrupt, RuntimeError, UserError):
        with pytest.raises(fault), atomic_folder(tmp_path / "tokens") as folder:
            (folder / "train-00000.bin").write_bytes(b"x")
            raise fault
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename"])
def test_a_refusing_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with (
        pytest.raises(UserError, match=r"tokens: cannot be written \(No space left on device\)"),
        atomic_folder(tmp_path / "tokens") as folder,
    ):
        (folder / "train-00000.bin").write_bytes(b"x")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_destination_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    with (
        pytest.raises(UserError, match="exists already; choose another destination or remove it"),
        atomic_folder(tmp_path / "tokens"),
    ):
        pass
    with (
        pytest.raises(UserError, match="absent: is not a folder; create it first"),
        atomic_folder(tmp_path / "absent" / "tokens"),
    ):
        pass


def test_a_destination_made_meanwhile_stays(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="exists already"),
        atomic_folder(tmp_path / "tokens"),
    ):
        (tmp_path / "tokens").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


HOLD = """
import sys
from pathlib import Path
from lowlat.utils.atomic_files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "train-00000.bin").write_bytes(b"x")
    print(folder.name, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """Regression: two builds at once of which one removes the other's files, and lost disk."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "tokens")]
    other = forked.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdin is not None
    left = tmp_path / other.stdout.readline().strip()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "tokens"):
        raise RuntimeError
    assert (left / "train-00000.bin").exists()
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    assert left.exists()
    with atomic_folder(tmp_path / "tokens"):
        assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_shards_are_full_but_for_the_last(tmp_path: Path) -> None:
    split = SplitWriter(tmp_path, "train", np.dtype("<u2"), shard_tokens=7)
    for length in (3, 11, 1, 2, 4):
        split.add(np.arange(length))
        split.end_document(length)
    manifest = split.finish()
    assert [shard.tokens for shard in manifest.shards] == [7, 7, 7]
    assert [path.stat().st_size for path in sorted(tmp_path.glob("train-0*"))] == [14, 14, 14]
    assert np.fromfile(tmp_path / "train-ends.bin", "<i8").tolist() == [3, 14, 15, 17, 21]
    joined = np.concatenate([np.fromfile(p, "<u2") for p in sorted(tmp_path.glob("train-0*"))])
    assert joined.tolist() == [*range(3), *range(11), 0, 0, 1, *range(4)]


def test_targets_may_begin_late(tmp_path: Path) -> None:
    """Texts before the first chat are targets as a whole."""
    split = SplitWriter(tmp_path, "train", np.dtype("<u2"))
    split.add(np.arange(11))
    split.end_document(11)
    split.add(np.arange(5), np.array([True, False, False, True, False]))
    split.end_document(5)
    split.add(np.arange(2))
    split.end_document(2)
    manifest = split.finish()
    bits = np.unpackbits(np.fromfile(tmp_path / "train-mask.bin", "u1"), bitorder="little")
    assert bits[:18].tolist() == [1] * 11 + [1, 0, 0, 1, 0] + [1, 1]
    assert manifest.predicted == 15


def test_a_pipe_is_no_shard(make_folder: Make) -> None:
    folder = make_folder([[END]]).path
    (folder / "train-00000.bin").unlink()
    os.mkfifo(folder / "train-00000.bin")
    with pytest.raises(UserError, match=r"train-00000.bin: not found"):
        TokenizedDataset.open(folder)
