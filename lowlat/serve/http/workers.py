"""WorkerPool: a thread pool with a bounded queue, for CPU work off the event loop."""

import asyncio
import threading
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
