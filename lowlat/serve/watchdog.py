"""Pulse: whether the engine's thread still gets on, as seen from another thread.

Owns telling a long step from one that hangs. From outside both are a thread that does not come
round; but who computes uses the processor, and who waits for what never comes does not.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

LOOK_SECONDS = 0.5
"""How often `look` is to be called."""
COMPUTING_SHARE = 0.01
"""Processor time from look to look that counts as computing. Reading weights from a disk takes
little, waiting takes none."""
LONGEST_STEP_SECONDS = 600.0
"""Even a step that computes is taken to be lost after so long. A slow machine may well need minutes
for its first share of a long prompt, of which no shorter step gives notice."""


class Pulse:
    """The engine's thread begins, beats and rests; the event loop looks and asks."""

    def __init__(self) -> None:
        self._clock: int | None = None
        self._beat_at: float | None = None
        """None while there is nothing to do."""
        self._in_model_since: float | None = None
        self._computed_at = 0.0
        self._looked = (0.0, 0.0)

    # --- on the engine's thread ----------------------------------------------------------------

    def begin(self) -> None:
        """Before all else, on the thread whose pulse this is."""
        # Not on macOS, where the whole process must do.
        if hasattr(time, "pthread_getcpuclockid"):
            self._clock = time.pthread_getcpuclockid(threading.get_ident())

    def beat(self) -> None:
        """There is something to do, and the thread is getting on with it."""
        self._beat_at = time.perf_counter()

    def rest(self) -> None:
        """There is nothing to do."""
        self._beat_at = None

    @contextlib.contextmanager
    def in_the_model(self) -> Iterator[None]:
        """While the thread may compute for long. What else it does takes moments."""
        self.beat()
        self._in_model_since = self._beat_at
        try:
            yield
        finally:
            self._in_model_since = None
            self.beat()

    # --- on any other --------------------------------------------------------------------------

    def look(self) -> None:
        """See whether the thread has computed since the last look."""
        now, used = time.perf_counter(), self._processor_seconds()
        last, used_before = self._looked
        if used - used_before >= COMPUTING_SHARE * (now - last):
            self._computed_at = now
        self._looked = (now, used)

    def silence(self) -> float:
        """Seconds without a sign that the thread gets on; 0 while it rests."""
        now, sign, since = time.perf_counter(), self._beat_at, self._in_model_since
        if sign is None:
            return 0.0
        if since is not None and now - since < LONGEST_STEP_SECONDS:
            sign = max(sign, self._computed_at)
        return max(0.0, now - sign)

    def _processor_seconds(self) -> float:
        if self._clock is None:
            return time.process_time()
        try:
            return time.clock_gettime(self._clock)
        except OSError:
            return 0.0  # The thread has ended.
