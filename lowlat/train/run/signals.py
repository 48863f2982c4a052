"""Graceful stop on SIGINT and SIGTERM: the run finishes the current step and writes a checkpoint. A
second SIGINT ends the process at once.
"""

import signal
from types import FrameType
from typing import Any


class StopSignals:
    """Catches the signals inside a `with` block of the main thread; `asked` is true after one."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
