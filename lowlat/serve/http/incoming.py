"""Bodies that are still arriving: slow ones are bounded per API key, per client address and in all.

A body takes no place in the queue of requests until it has arrived. When places or memory are
scarce, the slowest bodies are dropped first.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

GRACE_SECONDS = 1.0
"""A body that takes longer is slow."""
HEAD_START_BYTES = 1024
"""Counted in favour of each body, so that one that has just begun is not the slowest."""
MAX_BYTES = 256 * 2**20
"""Memory for bodies that have not arrived completely."""


class IncomingBody:
    """One body. `owners`: its API key and client address."""

    def __init__(self, owners: Sequence[str], waiting: asyncio.Timeout) -> None:
        self.owners = owners
        self.is_dropped = False
        self.num_bytes = 0
        self._started = time.monotonic()
        self._waiting = waiting

    @property
    def rate(self) -> float:
        """Bytes per second so far, with a head start."""
        elapsed = time.monotonic() - self._started
        return (self.num_bytes + HEAD_START_BYTES) / (elapsed + GRACE_SECONDS)

    def drop(self) -> None:
        """End the wait for the rest, by a TimeoutError."""
        if not self.is_dropped and not self._waiting.expired():
            self.is_dropped = True
            self._waiting.reschedule(asyncio.get_running_loop().time())


class IncomingBodies:
    """All bodies that are arriving; for one event loop.

    At most `max_slow` are slow, a quarter of them for each API key and for each client address.
    """

    def __init__(self, *, max_slow: int, max_bytes: int = MAX_BYTES) -> None:
        self._max_slow = max_slow
        self._max_slow_per_owner = max(1, max_slow // 4)
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._bodies: set[IncomingBody] = set()
        self._slow: set[IncomingBody] = set()
        self._slow_by_owner: Counter[str] = Counter()

    @contextlib.contextmanager
    def track(self, owners: Sequence[str], waiting: asyncio.Timeout) -> Iterator[IncomingBody]:
        """Count a body while it arrives, within `waiting`, which `drop` ends early."""
        body = IncomingBody(owners, waiting)
        self._bodies.add(body)
        timer = asyncio.get_running_loop().call_later(GRACE_SECONDS, self._find_slow, body)
        try:
            yield body
        finally:
            timer.cancel()
            self._bodies.discard(body)
            self._forget_slow(body)
            self._num_bytes -= body.num_bytes

    def add_bytes(self, body: IncomingBody, count: int) -> None:
        """Count `count` received bytes; drops the slowest bodies while there are too many."""
        body.num_bytes += count
        self._num_bytes += count
        if self._num_bytes > self._max_bytes:
            self.drop_slowest()

    def drop_slowest(self) -> bool:
        """Drop the slowest body; False if there is none."""
        return self._drop_slowest(self._bodies)

    def _find_slow(self, body: IncomingBody) -> None:
        self._slow.add(body)
        self._slow_by_owner.update(body.owners)
        for owner in body.owners:
            if self._slow_by_owner[owner] > self._max_slow_per_owner:
                self._drop_slowest([other for other in self._slow if owner in other.owners])
        if len(self._slow) > self._max_slow:
            self._drop_slowest(self._slow)

    def _drop_slowest(self, bodies: Collection[IncomingBody]) -> bool:
        present = [body for body in bodies if not body.is_dropped]
        if not present:
            return False
        slowest = min(present, key=lambda body: body.rate)
        slowest.drop()
        self._forget_slow(slowest)
        return True

    def _forget_slow(self, body: IncomingBody) -> None:
        if body in self._slow:
            self._slow.discard(body)
            self._slow_by_owner.subtract(body.owners)
            self._slow_by_owner += Counter()  # forgets owners without bodies
