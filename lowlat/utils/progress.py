"""Progress bars on stderr, a thin layer over rich: fetching, converting, evaluating, training.

Owns appearance and place (stderr, never stdout). Callers decide what is worth showing: they open a
task, advance it and leave it. Library code takes a `Progress` and defaults to `SilentProgress`.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol, final, runtime_checkable

from rich import progress as rich_progress
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column
from rich.text import Text

Unit = Literal["bytes", "tokens", "items"]


@runtime_checkable
class Task(Protocol):
    """One task under way."""

    def advance(self, n: int = 1) -> None:
        """Report n more units done."""
        ...


@runtime_checkable
class Progress(Protocol):
    """Shows tasks; one object serves a whole command, and tasks may nest or run in threads."""

    @property
    def shown(self) -> bool:
        """False if nothing is ever drawn; for libraries with progress bars of their own."""
        ...

    def task(
        self, label: str, total: int | None = None, unit: Unit = "items"
    ) -> AbstractContextManager[Task]:
        """A task of `total` units (None: unknown), finished when left without an exception."""
        ...


def amount(n: int | float, unit: Unit) -> str:
    """n units as people read them: '98.4 MB', '1,234 tokens', '12'."""
    if unit == "bytes":
        return decimal(int(n))
    text = f"{n:,.0f}" if n >= 100 or n == int(n) else f"{n:.1f}"
    return f"{text} tokens" if unit == "tokens" else text


@final
class _Count:
    """Counts and draws nothing; safe to advance from several threads."""

    def __init__(self) -> None:
        self.done = 0
        self._lock = threading.Lock()

    def advance(self, n: int = 1) -> None:
        with self._lock:
            self.done += n


@final
class SilentProgress:
    """Draws nothing."""

    shown = False

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: Unit = "items") -> Iterator[Task]:
        yield _Count()


@final
class PlainProgress:
    """One line on stderr when a task starts and one when it is done: for logs and pipes."""

    shown = True

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: Unit = "items") -> Iterator[Task]:
        size = "" if total is None else f" ({amount(total, unit)})"
        print(f"{label}{size} ...", file=sys.stderr, flush=True)
        count, start = _Count(), time.monotonic()
        yield count
        done = f" {amount(count.done, unit)}" if count.done else " done"
        seconds = time.monotonic() - start
        print(f"{label}:{done} in {seconds:.1f} s", file=sys.stderr, flush=True)


@final
class _AmountColumn(rich_progress.ProgressColumn):
    """'12.3 MB / 98.4 MB, 10.2 MB/s' in the task's own unit."""

    def render(self, task: rich_progress.Task) -> Text:
        unit: Unit = task.fields["unit"]
        if not task.completed and task.total is None:
            return Text("")
        text = amount(task.completed, unit)
        if task.total is not None:
            text += f" / {amount(task.total, unit)}"
        speed = task.finished_speed or task.speed
        return Text(text + (f", {amount(speed, unit)}/s" if speed else ""), "progress.download")


@final
class _RichTask:
    def __init__(self, bars: rich_progress.Progress, task_id: rich_progress.TaskID) -> None:
        self._bars = bars
        self._id = task_id
        self.count = _Count()

    def advance(self, n: int = 1) -> None:
        self.count.advance(n)
        self._bars.advance(self._id, n)


@final
class RichProgress:
    """Bars with amount, speed and remaining time on the terminal behind stderr."""

    shown = True

    def __init__(self) -> None:
        self._bars: rich_progress.Progress | None = None
        self._open = 0
        self._lock = threading.Lock()

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: Unit = "items") -> Iterator[Task]:
        bars = self._enter()
        task_id = bars.add_task(label, total=total, unit=unit)
        try:
            task = _RichTask(bars, task_id)
            yield task
            if total is None:  # else the bar would keep pulsing
                bars.update(task_id, total=task.count.done)
        finally:
            bars.stop_task(task_id)
            self._leave()

    def _enter(self) -> rich_progress.Progress:
        """The bars on screen; a terminal takes only one live area, so nested tasks share it."""
        with self._lock:
            if self._bars is None:
                self._bars = _new_bars()
                self._bars.start()
            self._open += 1
            return self._bars

    def _leave(self) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0 and self._bars is not None:
                self._bars.stop()
                self._bars = None


def _new_bars() -> rich_progress.Progress:
    return rich_progress.Progress(
        rich_progress.TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis"),
        ),
        rich_progress.BarColumn(bar_width=16),
        _AmountColumn(table_column=Column(no_wrap=True)),
        rich_progress.TimeRemainingColumn(
            compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)
        ),
        console=Console(stderr=True),
        # stdout carries the answer and may be a pipe: never send it through the bars' console.
        redirect_stdout=False,
    )


def make_progress(*, quiet: bool = False) -> Progress:
    """Bars where stderr is a terminal, plain lines where it is not, nothing if `quiet`."""
    if quiet or sys.stderr is None:
        return SilentProgress()
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return RichProgress()
    return PlainProgress()
