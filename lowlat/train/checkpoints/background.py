"""Background thread for one function at a time, with deferred errors."""

import threading
from collections.abc import Callable
from typing import final


@final
class BackgroundTask:
    """Runs one function at a time on a thread.

    The thread is not a daemon: the interpreter waits for it at exit, even after an exception.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_running(self) -> bool:
        """Whether the function still runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, function: Callable[[], object], name: str) -> None:
        """Start `function` on a thread called `name`; the one before must have been joined."""
        assert self._thread is None

        def run() -> None:
            try:
                function()
            except BaseException as error:  # raised again in the caller's thread
                self._error = error

        self._thread = threading.Thread(target=run, name=name)
        self._thread.start()

    def join(self) -> BaseException | None:
        """Wait for the function, if any; returns its exception, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error
