"""The bounded worker pool."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from lowlat.serve.generation import Overloaded
from lowlat.serve.http.workers import FairWorkerPool, WorkerPool


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


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60.0):
        while not condition():
            await asyncio.sleep(0.001)


def test_owners_take_turns() -> None:
    """Regression: one FIFO, in which many tasks of one owner delay all others."""

    async def main() -> None:
        pool = FairWorkerPool(threads=2, max_waiting=20)
        gates = {name: threading.Event() for name in ("first", "held")}
        done: list[str] = []

        def work(name: str, gate: str) -> None:
            gates[gate].wait(60.0)
            done.append(name)

        running = [asyncio.create_task(pool.run("a", work, "a0", "held"))]
        running += [asyncio.create_task(pool.run("a", work, f"a{n}", "first")) for n in (1, 2, 3)]
        await asyncio.sleep(0)
        # One thread is never that owner's, so another's task runs at once.
        gates["first"].set()
        await asyncio.wait_for(pool.run("b", work, "b0", "first"), 60.0)
        assert done == ["b0"]
        gates["first"].clear()
        for name in ("b1", "b2", "c1"):
            running.append(asyncio.create_task(pool.run(name[0], work, name, "first")))
        await asyncio.sleep(0)
        gates["first"].set()
        await until(lambda: len(done) == 4)
        assert sorted(done) == ["b0", "b1", "b2", "c1"]
        gates["held"].set()
        await asyncio.gather(*running)
        assert done[4:] == ["a0", "a1", "a2", "a3"]
        pool.close()

    asyncio.run(main())


def test_several_tasks_of_one_owner_run_at_once() -> None:
    async def main() -> None:
        pool = FairWorkerPool(threads=3, max_waiting=4)
        together = threading.Barrier(2)
        tasks = [pool.run("a", together.wait, 60.0) for _ in range(2)]
        assert sorted(await asyncio.gather(*tasks)) == [0, 1]
        with pytest.raises(ZeroDivisionError):
            await pool.run("a", divmod, 1, 0)
        assert await pool.run("a", divmod, 7, 2) == (3, 1)
        pool.close()

    asyncio.run(main())


def test_one_owner_leaves_half_of_the_queue() -> None:
    async def main() -> None:
        pool = FairWorkerPool(threads=1, max_waiting=4)
        gate = threading.Event()
        running = [asyncio.create_task(pool.run("a", gate.wait, 60.0)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await pool.run("a", int)
        running += [asyncio.create_task(pool.run("b", gate.wait, 60.0)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await pool.run("c", int)
        # A task that is given up leaves its place in the queue.
        running.pop().cancel()
        await asyncio.sleep(0)
        running.append(asyncio.create_task(pool.run("c", gate.wait, 60.0)))
        await asyncio.sleep(0)
        gate.set()
        assert await asyncio.gather(*running) == [True] * 5
        assert await pool.run("a", int) == 0
        assert not pool._waiting and not pool._running
        pool.close()

    asyncio.run(main())
