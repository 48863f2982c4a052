"""A replica: `lowlat serve`'s ASGI application with its model, as a Ray Serve deployment."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream
from ray import serve
from starlette.types import ASGIApp, Message

from lowlat.replicas.messages import ReplicaRequest, ResponseHead
from lowlat.replicas.options import ReplicaOptions

if TYPE_CHECKING:
    from lowlat.serve.async_engine import AsyncEngine


class Replica:
    """One model in one process. Ray sends requests from its event loop to `handle`."""

    async def __init__(self, options: ReplicaOptions) -> None:
        from lowlat.serve.app import build_app, make_state
        from lowlat.serve.http.logs import configure

        configure()
        self._name = serve.get_replica_context().replica_id.unique_id
        engine = await asyncio.to_thread(_load, options)
        self._state = make_state(engine, options.serve_config())
        app = build_app(self._state)
        self._app: ASGIApp = app
        self._lifespan = app.router.lifespan_context(app)
        await self._lifespan.__aenter__()

    async def __del__(self) -> None:
        """Called by Ray once, after requests have drained."""
        await self._lifespan.__aexit__(None, None, None)

    async def check_health(self) -> None:
        """Called by Ray, which replaces the replica if this raises. Raises EngineDead."""
        self._state.models.check_health()

    async def handle(self, request: ReplicaRequest) -> AsyncGenerator[ResponseHead | bytes, None]:
        """The response: its head with the first part of the body, then further parts."""
        sender, receiver = anyio.create_memory_object_stream[Message](1)
        is_gone = asyncio.Event()
        bodies = iter([{"type": "http.request", "body": request.body, "more_body": False}])

        async def receive() -> Message:
            for body in bodies:
                return body
            await is_gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            with suppress(anyio.BrokenResourceError):  # as servers do after a disconnect
                await sender.send(message)

        async def respond() -> None:
            async with sender:
                await self._app({**request.scope, "state": {}}, receive, send)

        task = asyncio.create_task(respond())
        try:
            async with receiver:
                start, first = await receiver.receive(), await receiver.receive()
                yield ResponseHead(
                    replica=self._name,
                    status=start["status"],
                    headers=list(start.get("headers", ())),
                    body=first.get("body", b""),
                )
                async for part in _parts(receiver):
                    yield part
        finally:
            # The client has left, or the response is complete.
            is_gone.set()
            await task

    async def metrics(self, request: ReplicaRequest) -> tuple[ResponseHead, bytes]:
        """The complete response to GET /metrics."""
        async with asyncio.timeout(60.0):
            responses = [part async for part in self.handle(request)]
        head, *rest = responses
        assert isinstance(head, ResponseHead)
        return head, head.body + b"".join(part for part in rest if isinstance(part, bytes))


async def _parts(receiver: MemoryObjectReceiveStream[Message]) -> AsyncGenerator[bytes, None]:
    async for message in receiver:
        if body := message.get("body", b""):
            yield body


def _load(options: ReplicaOptions) -> "AsyncEngine":
    """The engine of the model. Raises UserError."""
    from lowlat import api
    from lowlat.ops import native
    from lowlat.serve.async_engine import AsyncEngine

    if options.threads is not None:
        native.use_threads(options.threads)
    memory = options.cache_memory
    model = api.load(
        options.model,
        dtype=options.dtype,
        cache=options.cache,
        context=options.max_context,
        max_cache_bytes="auto" if memory is None else int(memory * 2**30),
        prefix_cache_dir=options.prefix_cache_dir,
        speculates=options.speculate,
        lora=options.lora,
    )
    model.tokenizer.require()
    return AsyncEngine(model, max_queue=options.max_queue)
