"""Calibration text: which windows of it are used, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lowlat.convert.calibration import read_calibration
from lowlat.utils.errors import UserError
from tests.fakes import byte_tokenizer

Text = Callable[[Path], None]


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: None, "cannot be read"),
        (lambda path: path.write_bytes(b"\xff\xfe" * 9000), "not UTF-8"),
        (lambda path: path.write_bytes(b"a\0" * 9000), "zero bytes"),
        (lambda path: path.write_text("short"), "5 tokens are too few, at least 432"),
    ],
)
def test_unfit_calibration_text(tmp_path: Path, write: Text, words: str) -> None:
    path = tmp_path / "text"
    write(path)
    with pytest.raises(UserError, match=words):
        read_calibration([path], byte_tokenizer(), 36)


def test_calibration_windows_are_spread_over_the_texts(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name * 4000)
    found = read_calibration([tmp_path / n for n in "abc"], byte_tokenizer(), 100)
    assert (len(found.windows), len(found.held_out), found.origin) == (64, 4, "a, b, c")
    letters = [set(map(chr, part.flatten().tolist())) for part in (found.windows, found.held_out)]
    assert letters == [set("abc"), set("abc")]


def test_without_text_there_is_text() -> None:
    found = read_calibration([], byte_tokenizer(), 4096)
    assert found.windows.shape == (64, 1024)
    assert "lowlat" in found.origin
