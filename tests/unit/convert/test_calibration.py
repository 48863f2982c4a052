"""Calibration text: which windows of it are used, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lowlat.convert.compression.calibration import calibration_from_tokens, read_calibration
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


def test_short_texts_are_joined(tmp_path: Path) -> None:
    """Many of them are as good as one long text, and none next to a long one is left out."""
    for name in "abcdefghijklmnopqrst":
        (tmp_path / name).write_text(name * 70)
    paths = sorted(tmp_path.iterdir())
    found = read_calibration(paths, byte_tokenizer(), 100)
    windows = torch.cat([found.windows, found.held_out])
    assert windows.shape == (14, 100)
    assert set(map(chr, windows.flatten().tolist())) == set("abcdefghijklmnopqrst")
    (tmp_path / "long").write_text("z" * 1000)
    found = read_calibration([tmp_path / "long", *paths], byte_tokenizer(), 100)
    windows = torch.cat([found.windows, found.held_out])
    assert windows.shape == (24, 100)
    assert set(map(chr, windows.flatten().tolist())) == set("abcdefghijklmnopqrstz")


def test_records_are_no_calibration_text(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "words"}\n' * 900)
    with pytest.raises(UserError, match=r"--calibrate .*text\.jsonl: this is a file of records"):
        read_calibration([tmp_path / "text.jsonl"], byte_tokenizer(), 36)


def test_without_text_there_is_text() -> None:
    found = read_calibration([], byte_tokenizer(), 4096)
    assert found.windows.shape == (64, 1024)
    assert "lowlat" in found.origin


@pytest.mark.parametrize("count", [1200, 4321, 68 * 100, 99_999])
def test_tokens_are_windows_spread_over_all_of_them(count: int) -> None:
    found = calibration_from_tokens(lambda places: places, count, 100, "tokens")
    assert found is not None and found.origin == "tokens"
    windows = torch.cat([found.windows, found.held_out])
    assert windows.shape == (min(68, count // 100), 100) and len(found.held_out) == 4
    starts = sorted(windows[:, 0].tolist())
    assert torch.equal(windows, windows[:, :1] + torch.arange(100))
    gaps = np.diff([*starts, count // 100 * 100])
    assert starts[0] == 0 and max(gaps) - min(gaps) <= 100 and min(gaps) >= 100


def test_few_tokens_are_no_calibration() -> None:
    assert calibration_from_tokens(lambda places: places, 1199, 100, "tokens") is None


def test_a_context_without_a_token_to_predict() -> None:
    """Regression: a division by the number of predictions."""
    for read in (
        lambda: read_calibration([], byte_tokenizer(), 1),
        lambda: calibration_from_tokens(lambda places: places, 9999, 1, "tokens"),
    ):
        with pytest.raises(UserError, match=r"max_position_embeddings 1 .* set it to 2 or more"):
            read()
    assert read_calibration([], byte_tokenizer(), 2).windows.shape == (64, 2)
