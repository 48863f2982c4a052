"""LoadProgress: the progress of loading a model, as a fraction for metrics and errors."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from lowlat.utils.progress import Task, Unit


@final
class LoadProgress:
    """Records the task under way, such as a download, a conversion, or reading weights; draws
    nothing. Written by the loading thread, read by the event loop.
    """

    shown = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total: int | None = None
        self._done = 0
        self.label = ""
        """What is being done; empty before the first task."""

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: Unit = "items") -> Iterator[Task]:
        with self._lock:
            self.label, self._total, self._done = label, total, 0
        yield self

    def advance(self, n: int = 1) -> None:
        with self._lock:
            self._done += n

    @property
    def fraction(self) -> float:
        """Part of the task under way that is done, 0 to 1; 0 if its size is unknown."""
        with self._lock:
            return min(1.0, self._done / self._total) if self._total else 0.0
