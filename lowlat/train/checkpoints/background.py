"""One piece of work at a time on a thread, whose outcome is asked for later.

Owns the thread. What the work is and what a failure means is the caller's.
"""

import threading
from collections.abc import Callable
from typing import final


@final
class Background:
    """Runs one function at a time beside the caller.

    The thread is no daemon: an interpreter that ends, even by an exception, lets it finish.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether the work goes on."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], object], name: str) -> None:
        """Begin `work`; the outcome of what was started before must have been asked for."""
        assert self._thread is None

        def run() -> None:
            try:
                work()
            except BaseException as error:  # raised again in the caller's thread
                self._error = error

        self._thread = threading.Thread(target=run, name=name)
        self._thread.start()

    def outcome(self) -> BaseException | None:
        """Wait for the end of the work, if any; what it raised, told once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error
