"""Progress: where it draws, what it prints, and that it counts."""

import io
import sys
import threading
from collections.abc import Callable

import pytest

from lowlat.utils.progress import (
    PlainProgress,
    Progress,
    RichProgress,
    SilentProgress,
    Task,
    Unit,
    amount,
    make_progress,
)
from tests.terminal import attach_terminal


@pytest.mark.parametrize(
    ("n", "unit", "text"),
    [
        (98_362_432, "bytes", "98.4 MB"),
        (0, "bytes", "0 bytes"),
        (1234, "tokens", "1,234 tokens"),
        (7, "items", "7"),
        (3.14, "tokens", "3.1 tokens"),
        (123.4, "items", "123"),
    ],
)
def test_amounts_read_well(n: float, unit: Unit, text: str) -> None:
    assert amount(n, unit) == text


def test_kind_follows_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    attach_terminal(monkeypatch, columns=140)
    assert isinstance(make_progress(), RichProgress)
    assert isinstance(make_progress(quiet=True), SilentProgress)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_progress(), PlainProgress)
    monkeypatch.setenv("TERM", "xterm")
    # A pipe gets no bars even where colour is forced.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(make_progress(), PlainProgress)
    monkeypatch.setattr(sys, "stderr", None)
    assert isinstance(make_progress(), SilentProgress)


def test_silent_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with SilentProgress().task("x", 3, "tokens") as task:
        task.advance(3)
    assert capsys.readouterr() == ("", "")
    assert not SilentProgress().shown


def test_plain_prints_one_line_at_each_end(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainProgress().task("fetching a[b]", 2_000_000, "bytes") as task:
        for _ in range(2):
            task.advance(1_000_000)
    out, err = capsys.readouterr()
    assert out == ""
    first, last = err.splitlines()
    assert first == "fetching a[b] (2.0 MB) ..."
    assert last.startswith("fetching a[b]: 2.0 MB in 0.")


def test_plain_does_not_claim_the_end_of_a_failed_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), PlainProgress().task("x", 3):
        raise KeyError
    assert capsys.readouterr().err == "x (3) ...\n"


def test_bars_draw_on_stderr_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """stdout carries the model's answer: a bar, or print() while one is shown, must not mix in."""
    terminal = attach_terminal(monkeypatch, columns=140)
    with make_progress().task("fetching [bold]x", 98_362_432, "bytes") as task:
        task.advance(98_362_432)
        print("the answer")
    assert capsys.readouterr().out == "the answer\n"
    drawn = terminal.getvalue()
    assert "fetching [bold]x" in drawn
    assert "98.4 MB / 98.4 MB" in drawn
    assert "the answer" not in drawn


def test_bars_of_unknown_length_end_full(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = attach_terminal(monkeypatch, columns=140)
    with make_progress().task("reading", unit="tokens") as task:
        task.advance(1009)
    assert "1,009 tokens / 1,009 tokens" in terminal.getvalue()


def test_bars_nest_and_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal takes one live area: a second one inside the first would raise."""
    terminal = attach_terminal(monkeypatch, columns=140)
    progress = make_progress()
    with progress.task("outer", 2), progress.task("inner", 3) as inner:
        inner.advance(3)
    terminal.truncate(0)
    with pytest.raises(KeyError), progress.task("failing", 2):
        raise KeyError
    with progress.task("again", 1) as task:
        task.advance()
    drawn = terminal.getvalue()
    assert "again" in drawn
    assert "outer" not in drawn


@pytest.mark.parametrize("make", [SilentProgress, RichProgress, PlainProgress])
def test_threads_lose_no_count(
    make: Callable[[], Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = attach_terminal(monkeypatch, columns=140)
    progress = make()
    assert isinstance(progress, Progress)

    def work(task: Task) -> None:
        for _ in range(101):
            task.advance()

    with progress.task("x", 7 * 101) as task:
        threads = [threading.Thread(target=work, args=(task,)) for _ in range(7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert isinstance(task, Task)
    if make is not SilentProgress:
        assert "707" in terminal.getvalue()
