"""log.jsonl: what survives a kill, and what a resumed run supersedes."""

import errno
import os
import sys
from pathlib import Path

import pytest

from lowlat.train.metrics import jsonl
from lowlat.train.metrics.jsonl import LogWriter, read_log
from lowlat.train.metrics.lines import encode
from lowlat.train.metrics.record import NoteRecord, Record
from lowlat.utils.errors import UserError
from tests import forked
from tests.unit.train.metrics.records import evaluation, start, step


def write(path: Path, *records: Record) -> int:
    """Append `records` as a run does; the bytes it cut off before."""
    writer = LogWriter(path)
    for record in records:
        writer.write(record)
    writer.close()
    return writer.cut_bytes


def test_history_of_one_run(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, start(), step(1), NoteRecord(step=1, text="a"), step(2), evaluation(2))
    history = read_log(path)
    assert history.starts == [start()]
    assert [record.step for record in history.steps] == [1, 2]
    assert history.evaluations == [evaluation(2)]
    assert [note.text for note in history.notes] == ["a"]
    assert not history.torn and history.superseded == 0


def test_every_record_is_in_the_file_at_once(tmp_path: Path) -> None:
    """Regression: records in a buffer that a kill would take along."""
    writer = LogWriter(tmp_path / "log.jsonl")
    writer.write(start())
    writer.write(step(1))
    assert len(read_log(tmp_path / "log.jsonl").steps) == 1
    writer.close()


def test_resumed_run_supersedes_later_steps_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, start(), step(1), step(2), evaluation(2, loss=1.0), step(3), evaluation(3))
    before = path.read_bytes()
    write(path, start(2), evaluation(2, loss=9.0), step(3, loss=7.0), step(4))
    assert path.read_bytes().startswith(before)  # nothing is rewritten
    history = read_log(path)
    assert [record.step for record in history.steps] == [1, 2, 3, 4]
    assert history.steps[2].loss == 7.0
    assert history.evaluations == [evaluation(2, loss=9.0)]
    assert history.superseded == 1
    assert history.start.step == 2


def test_run_from_the_beginning_supersedes_all(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, start(), step(1), step(2), evaluation(1))
    write(path, start(), step(1, loss=7.0))
    history = read_log(path)
    assert [record.loss for record in history.steps] == [7.0]
    assert history.evaluations == []


def test_torn_at_any_byte(tmp_path: Path) -> None:
    """Regression: a line that a kill left half written breaking a report or glueing itself to
    the next run's first record.
    """
    path = tmp_path / "log.jsonl"
    whole, torn = encode(start()) + encode(step(1)), encode(step(2, experts=()))
    for length in range(1, len(torn)):
        path.write_bytes(whole + torn[:length])
        history = read_log(path)
        assert history.torn and [record.step for record in history.steps] == [1]
        assert write(path, start(1), step(2)) == length
        history = read_log(path)
        assert not history.torn and [record.step for record in history.steps] == [1, 2]


def test_torn_line_longer_than_a_block_and_torn_first_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "_BLOCK_BYTES", 5)
    path = tmp_path / "log.jsonl"
    path.write_bytes(encode(start()) + b"x" * 23)
    assert write(path) == 23
    assert path.read_bytes() == encode(start())
    path.write_bytes(b"x" * 23)
    assert write(path, start()) == 23
    assert path.read_bytes() == encode(start())


def test_kill_loses_nothing_written(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    script = (
        "import os, sys, signal\nfrom pathlib import Path\n"
        "from lowlat.train.metrics.jsonl import LogWriter\n"
        "from lowlat.train.metrics.record import NoteRecord\n"
        f"writer = LogWriter(Path({str(path)!r}))\n"
        "for step in range(17): writer.write(NoteRecord(step=step, text='a'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    forked.run([sys.executable, "-c", script], check=False, timeout=120)
    assert path.read_bytes().count(b"\n") == 17


def test_damage_before_the_end_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(encode(start()) + b'{"kind":"step"}\n' + encode(step(2)))
    with pytest.raises(UserError, match=r"log.jsonl: line 2: .*delete that line"):
        read_log(path)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "no such log"),
        (b"", "the log is empty"),
        (b'{"kind":"sta', "the log is empty"),
        (encode(NoteRecord(step=0, text="a")), "the log is empty"),
        (encode(step(1)), "line 1: a log begins with a start record"),
        (b"\xff\xfe\n", "line 1: not valid JSON"),
    ],
)
def test_no_history(tmp_path: Path, content: bytes | None, fault: str) -> None:
    path = tmp_path / "log.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=fault) as caught:
        read_log(path)
    assert "\n" not in str(caught.value)


def test_folder_in_place_of_the_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_log(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        LogWriter(tmp_path)


def test_full_disk_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log.jsonl")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._file.fileno())
    os.close(full)
    with pytest.raises(UserError, match=f"{os.strerror(errno.ENOSPC)}.*free space"):
        writer.write(start())
    writer.close()
