"""The bounded worker pool."""

import asyncio
import threading

import pytest

from lowlat.serve.generation import Overloaded
from lowlat.serve.http.workers import WorkerPool


def test_results_and_exceptions_are_returned() -> None:
    async def main() -> None:
        pool = WorkerPool(threads=1, max_waiting=1)
        assert await pool.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await pool.run(divmod, 1, 0)
        pool.close()

    asyncio.run(main())


def test_too_much_waiting_work_is_refused_at_once() -> None:
    """Regression: a queue that grows as long as clients send."""

    async def main() -> None:
        pool = WorkerPool(threads=1, max_waiting=2)
        gate = threading.Event()
        running = [asyncio.create_task(pool.run(gate.wait, 60)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await pool.run(int)
        gate.set()
        assert await asyncio.gather(*running) == [True] * 3
        assert await pool.run(int) == 0
        pool.close()

    asyncio.run(main())


def test_an_abandoned_task_keeps_its_slot() -> None:
    """Regression: cancelled callers that free slots of running tasks."""

    async def main() -> None:
        pool = WorkerPool(threads=1, max_waiting=1)
        begun, gate = threading.Event(), threading.Event()

        def wait() -> bool:
            begun.set()
            return gate.wait(60)

        first = asyncio.create_task(pool.run(wait))
        second = asyncio.create_task(pool.run(wait))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await pool.run(int)
        gate.set()
        assert await second
        pool.close()

    asyncio.run(main())
