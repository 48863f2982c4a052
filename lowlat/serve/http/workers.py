"""Thread pools with bounded queues, for CPU work off the event loop.

WorkerPool serves tasks in the order of their arrival, FairWorkerPool interleaves those of owners.
"""

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from lowlat.serve.generation import Overloaded

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class WorkerPool:
    """Runs functions in `threads` threads; at most `max_waiting` tasks wait for one."""

    def __init__(self, *, threads: int, max_waiting: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="lowlat-work")
        self._room = threading.Semaphore(threads + max_waiting)

    async def run(
        self,
        function: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """`function(*args, **kwargs)`. Raises Overloaded if the queue is full.

        If the caller is cancelled, a task that has not started is dropped; a running one finishes
        and its result is discarded.
        """
        if not self._room.acquire(blocking=False):
            raise Overloaded(retry_after=1)
        future = self._executor.submit(function, *args, **kwargs)
        # The slot is released when the thread is free, not when the caller stops waiting.
        future.add_done_callback(lambda _: self._room.release())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Stop the threads after their current tasks; waiting tasks are dropped."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class FairWorkerPool:
    """Runs functions in `threads` threads, fairly between owners such as API keys; for one event
    loop.

    The next task is one of the owner with the fewest running tasks. One owner leaves a thread, and
    half of the `max_waiting` places in the queue, to the others.
    """

    def __init__(self, *, threads: int, max_waiting: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="lowlat-work")
        self._num_free = threads
        self._most_running = max(1, threads - 1)
        self._max_waiting = max_waiting
        self._running: Counter[str] = Counter()
        # Owners in the order of their last turn.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def run(
        self,
        owner: str,
        function: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """`function(*args, **kwargs)`. Raises Overloaded if the queue, or the owner's part of it,
        is full. If the caller is cancelled, as `WorkerPool.run`.
        """
        loop = asyncio.get_running_loop()
        await self._wait_for_turn(owner)
        try:
            future = self._executor.submit(function, *args, **kwargs)
        except BaseException:
            self._end_turn(owner)
            raise
        future.add_done_callback(lambda _: _call_on(loop, self._end_turn, owner))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Stop the threads after their current tasks."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _wait_for_turn(self, owner: str) -> None:
        turns = self._waiting.setdefault(owner, deque())
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        turns.append(turn)
        self._start_next()
        try:
            if not turn.done():
                self._check_room(owner)
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self._end_turn(owner)
            elif turn in turns:
                turns.remove(turn)
                if not turns:
                    del self._waiting[owner]
            raise

    def _check_room(self, owner: str) -> None:
        """Raise Overloaded if too many tasks wait, the newest included."""
        waiting = sum(map(len, self._waiting.values()))
        own = max(1, self._max_waiting // 2)
        if waiting > self._max_waiting or len(self._waiting[owner]) > own:
            raise Overloaded(retry_after=1)

    def _start_next(self) -> None:
        while self._num_free > 0:
            ready = [owner for owner in self._waiting if self._running[owner] < self._most_running]
            if not ready:
                return
            owner = min(ready, key=self._running.__getitem__)
            turns = self._waiting.pop(owner)
            turn = turns.popleft()
            if turns:
                self._waiting[owner] = turns  # at the end: the others come first
            if turn.cancelled():
                continue
            turn.set_result(None)
            self._running[owner] += 1
            self._num_free -= 1

    def _end_turn(self, owner: str) -> None:
        self._num_free += 1
        self._running[owner] -= 1
        if not self._running[owner]:
            del self._running[owner]
        self._start_next()


def _call_on(
    loop: asyncio.AbstractEventLoop, function: Callable[[str], None], argument: str
) -> None:
    """Call `function` on the loop from another thread, unless the loop has ended."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, argument)
