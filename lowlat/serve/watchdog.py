"""Watchdog of the engine's thread: heartbeats, and whether a silent thread computes or hangs.

A long step and a hanging one both send no heartbeat. A computing thread uses processor time, a
hanging one does not.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

CHECK_SECONDS = 0.5
"""Interval between calls of `check`."""
COMPUTING_SHARE = 0.01
"""Share of processor time between two checks that counts as computing. Reading weights from a disk
takes little, waiting takes none."""
LONGEST_STEP_SECONDS = 600.0
"""A step that computes for longer counts as hanging. A slow machine may need minutes for the first
prefill chunk of a long prompt, and sends no heartbeat meanwhile."""


class Watchdog:
    """The engine's thread calls begin, beat and rest; the event loop calls check and silence."""

    def __init__(self) -> None:
        self._clock: int | None = None
        self._beat_at: float | None = None
        """Clock of the last heartbeat; None while there is no work."""
        self._in_model_since: float | None = None
        self._computed_at = 0.0
        self._last_check = (0.0, 0.0)

    # --- on the engine's thread ----------------------------------------------------------------

    def begin(self) -> None:
        """First call, on the watched thread."""
        # macOS has no clock per thread; there the processor time of the whole process counts.
        if hasattr(time, "pthread_getcpuclockid"):
            self._clock = time.pthread_getcpuclockid(threading.get_ident())

    def beat(self) -> None:
        """Heartbeat: there is work, and the thread advances."""
        self._beat_at = time.perf_counter()

    def rest(self) -> None:
        """There is no work."""
        self._beat_at = None

    @contextlib.contextmanager
    def in_the_model(self) -> Iterator[None]:
        """Context in which the thread may compute for long; everything else is short."""
        self.beat()
        self._in_model_since = self._beat_at
        try:
            yield
        finally:
            self._in_model_since = None
            self.beat()

    # --- on any other thread -------------------------------------------------------------------

    def check(self) -> None:
        """Measure whether the thread has computed since the last check."""
        now, used = time.perf_counter(), self._processor_seconds()
        last, used_before = self._last_check
        if used - used_before >= COMPUTING_SHARE * (now - last):
            self._computed_at = now
        self._last_check = (now, used)

    def silence(self) -> float:
        """Seconds without a heartbeat or computation; 0 while there is no work."""
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
