"""run_in_daemon_thread: run a blocking function in a daemon thread, for an event loop."""

import asyncio
import threading
import traceback
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


async def run_in_daemon_thread(function: Callable[..., Result], *args: object) -> Result:
    """`function(*args)` in a thread that the end of the program does not wait for.

    An exception's traceback keeps its lines, and loses the local variables of its frames.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def finish(result: Result | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # pyright: ignore[reportArgumentType]
        else:
            future.set_exception(error)

    def run() -> None:
        result, failure = None, None
        try:
            result = function(*args)
        except BaseException as error:
            _clear_frames(error)
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish, result, failure)

    threading.Thread(target=run, name="lowlat-load", daemon=True).start()
    return await future


def _clear_frames(error: BaseException) -> None:
    """Free what the frames of `error` and of the errors before it hold, such as weights: they are
    in reference cycles with it, which only the garbage collector ends."""
    chain: list[BaseException | None] = [error]
    cleared: list[BaseException] = []
    while chain:
        each = chain.pop()
        if each is not None and each not in cleared:
            traceback.clear_frames(each.__traceback__)
            cleared.append(each)
            chain += [each.__cause__, each.__context__]
