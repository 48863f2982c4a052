"""WorkPool: CPU work of requests off the event loop, with a bounded queue.

Owns threads and the bound; knows nothing of the work.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from lowlat.serve.generation import Overloaded

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class WorkPool:
    """Runs functions in `threads` threads; at most `max_waiting` wait for one."""

    def __init__(self, *, threads: int, max_waiting: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="lowlat-work")
        self._room = threading.Semaphore(threads + max_waiting)

    async def run(
        self,
        function: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """`function(*args, **kwargs)`. Raises Overloaded where too much waits already.

        Work whose caller is cancelled ends where it has not begun; else it runs to its end unseen.
        """
        if not self._room.acquire(blocking=False):
            raise Overloaded(retry_after=1)
        future = self._executor.submit(function, *args, **kwargs)
        # Room is given back when the thread is free, not when the caller stops waiting.
        future.add_done_callback(lambda _: self._room.release())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the threads after their present work; what waits is dropped."""
        self._executor.shutdown(wait=False, cancel_futures=True)
