"""A server in a thread of this process, so that tests can look into it and break its parts.

All of it is real: sockets, HTTP, the app, the engine, the engine. Only the model is a script.
"""

import asyncio
import contextlib
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.routing import Route

from lowlat.generate.model import Model
from lowlat.serve import run as run_module
from lowlat.serve.app import build_app, make_state
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.config import ServeConfig
from lowlat.serve.state import ServerState
from tests.fakes import ScriptedModel, byte_tokenizer, gqa_config

from .wire import SECONDS

NAME = "counting"


def counting_model(**options: Any) -> Model:
    """Every byte is followed by the next one, and the alphabet starts again after its end."""
    config = gqa_config(max_position_embeddings=options.pop("context", 512))
    model = ScriptedModel(config, lambda token: ord("a") if token >= 122 else token + 1)
    return Model(model, byte_tokenizer(), name=NAME, **options)


def successors(text: str, count: int) -> str:
    """The output of counting_model for `text`."""
    last, said = ord(text[-1]), ""
    for _ in range(count):
        last = ord("a") if last >= 122 else last + 1
        said += chr(last)
    return said


@dataclass(eq=False, kw_only=True)
class Local:
    """A running server."""

    model: Model
    engine: AsyncEngine
    port: int
    state: ServerState
    loop: asyncio.AbstractEventLoop

    def num_tasks(self) -> int:
        """Tasks of its event loop that have not ended."""

        async def count() -> int:
            return len(asyncio.all_tasks())

        return asyncio.run_coroutine_threadsafe(count(), self.loop).result(SECONDS)

    def num_pages(self) -> int:
        """Pages of the cache that a sequence holds."""
        return self.model.runner.allocator.num_used

    @functools.cached_property
    def routes(self) -> list[tuple[str, str]]:
        """(method, path) of all."""
        found = [
            (method, route.path.replace("{id:path}", NAME))
            for route in build_app(self.state).routes
            if isinstance(route, Route)
            for method in sorted(route.methods or ())
        ]
        assert len(found) > 20
        return found

    @property
    def is_idle(self) -> bool:
        return (
            not self.model.engine.has_work
            and self.num_pages() == 0
            and self.state.num_requests == 0
            and self.state.num_preparing == 0
        )


def num_threads() -> int:
    """Of this process, without those of the work pool, which start when there is work for one more
    and of which there is a fixed number at most.
    """
    names = [thread.name for thread in threading.enumerate()]
    return sum(not name.startswith("lowlat-work") for name in names)


def num_descriptors() -> int:
    """Open files and sockets of this process."""
    return len(os.listdir("/proc/self/fd"))


def until(condition: Callable[[], Any], what: str = "it") -> None:
    """Wait for what must come."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, f"{what} never came"
        time.sleep(0.01)


@contextlib.contextmanager
def listening(
    model: Model | None = None,
    *,
    engine: AsyncEngine | None = None,
    max_queue: int = 256,
    send_buffer: int = 0,
    **options: Any,
) -> Iterator[Local]:
    """A server with `options` of ServeConfig; `send_buffer` bytes are those of the kernel.

    engine: the one it asks, instead of an engine of `model`.
    """
    engine = engine or AsyncEngine(model or counting_model(), max_queue=max_queue)
    config = ServeConfig(port=0, **options)
    with run_module.open_socket(config) as listener:
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        started: list[Local] = []
        servers: list[uvicorn.Server] = []

        async def serve() -> None:
            state = make_state(engine, config)
            servers.append(uvicorn.Server(run_module._uvicorn_config(state)))
            port = listener.getsockname()[1]
            loop = asyncio.get_running_loop()
            started.append(
                Local(model=engine.model, engine=engine, port=port, state=state, loop=loop)
            )
            await servers[0].serve(sockets=[listener])

        thread = threading.Thread(target=lambda: asyncio.run(serve()), name="server")
        thread.start()
        try:
            until(lambda: servers and servers[0].started, "the server")
            yield started[0]
        finally:
            servers[0].should_exit = True
            thread.join(SECONDS)
            assert not thread.is_alive()
