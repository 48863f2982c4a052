"""Whole files with bounded memory: what is refused, and where the limit lies."""

import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from lowlat.utils.bounded_read import CHUNK, read_bounded, read_bounded_text, read_stream
from lowlat.utils.errors import UserError


class Endless(io.RawIOBase):
    """A stream without end; counts the bytes it gave."""

    given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        self.given += len(buffer)
        return len(buffer)


def test_a_file_up_to_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(range(7)))
    assert read_bounded(file, 7, "a") == bytes(range(7))
    with pytest.raises(UserError, match=r"^--text a: has more than 0 MiB, .*shorten it$"):
        read_bounded(file, 6, "--text a")


def test_line_ends_are_those_of_text_files(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"a\r\nb\rc\n\r\r\n")
    assert read_bounded_text(file, 99, "a") == file.read_text()


def test_an_endless_stream_is_left_at_the_limit() -> None:
    stream = Endless()
    with pytest.raises(UserError, match="has more than 3 MiB"):
        read_stream(io.BufferedReader(stream).read, 3 * CHUNK, "standard input")
    assert stream.given <= 5 * CHUNK


def test_a_device_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/zero filled the memory; opening others can have effects."""
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(UserError, match="x: is a device, not a file; give the path of a file"):
        read_bounded(Path("/dev/zero"), 99, "x")


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"text",))
    writer.start()
    assert read_bounded(pipe, 4, "x") == b"text"
    writer.join()


def test_an_absent_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "absent", 9, "x")
