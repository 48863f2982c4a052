"""Bodies on their way: places, memory, and which is dropped."""

import asyncio
import contextlib

import pytest

from lowlat.serve.http import incoming
from lowlat.serve.http.incoming import IncomingBodies

FOREVER = 60.0


async def arrive(bodies: IncomingBodies, sizes: list[int], *owners: str) -> str:
    """A body of these parts that never ends; how the wait for it ended."""
    try:
        async with asyncio.timeout(FOREVER) as waiting:
            with bodies.track(owners, waiting) as body:
                for size in sizes:
                    bodies.add_bytes(body, size)
                await asyncio.Event().wait()
    except TimeoutError:
        return "dropped"
    return "over"


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0.01)


def ended(tasks: list[asyncio.Task[str]]) -> list[bool]:
    return [task.done() for task in tasks]


async def end(tasks: list[asyncio.Task[str]]) -> None:
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)


def test_the_slowest_of_an_owner_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "GRACE_SECONDS", 0.01)

    async def main() -> None:
        bodies = IncomingBodies(max_slow=8)
        sizes = (500, 1, 400)
        tasks = [asyncio.create_task(arrive(bodies, [size], "a", "key")) for size in sizes]
        tasks.append(asyncio.create_task(arrive(bodies, [0], "b")))
        await settle()
        assert ended(tasks) == [False, True, False, False]
        assert tasks[1].result() == "dropped"
        await end(tasks)
        assert not bodies._slow and not bodies._bodies and not bodies._slow_by_owner
        assert bodies._num_bytes == 0

    asyncio.run(main())


def test_places_are_bounded_over_all_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "GRACE_SECONDS", 0.01)

    async def main() -> None:
        bodies = IncomingBodies(max_slow=4)
        tasks = [asyncio.create_task(arrive(bodies, [500 * (n + 1)], f"o{n}")) for n in range(7)]
        await settle()
        assert sum(ended(tasks)) == 3 and not any(ended(tasks[4:]))
        await end(tasks)

    asyncio.run(main())


def test_memory_is_bounded() -> None:
    async def main() -> None:
        bodies = IncomingBodies(max_slow=100, max_bytes=1000)
        tasks = [asyncio.create_task(arrive(bodies, [100], f"o{n}")) for n in range(10)]
        await settle()
        assert not any(ended(tasks))
        tasks.append(asyncio.create_task(arrive(bodies, [300], "late")))
        await settle()
        assert 1 <= sum(ended(tasks[:10])) <= 3 and not tasks[10].done()
        await end(tasks)

    asyncio.run(main())


def test_a_body_that_has_just_begun_is_not_the_slowest() -> None:
    async def main() -> None:
        bodies = IncomingBodies(max_slow=100)
        tasks = [asyncio.create_task(arrive(bodies, [1], "a"))]
        await settle()
        tasks.append(asyncio.create_task(arrive(bodies, [], "b")))
        await asyncio.sleep(0)
        assert bodies.drop_slowest()
        await settle()
        assert ended(tasks) == [True, False]
        await end(tasks)

    asyncio.run(main())


def test_dropping_the_slowest_of_none() -> None:
    assert not IncomingBodies(max_slow=4).drop_slowest()
