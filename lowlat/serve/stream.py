"""EventStream: a response of server-sent events, whatever they tell.

Owns the encoding, the comments that keep a silent stream open, and giving up on a client that takes
nothing. Does not watch for the client leaving: `serve.endpoint` does, for all responses.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from lowlat.serve.body import Disconnected
from lowlat.serve.config import ServeConfig
from lowlat.serve.errors import describe, error_object
from lowlat.serve.logs import log

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def event(data: str, *, name: str | None = None) -> bytes:
    """One event whose data is `data`, JSON on one line."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {data}\n\n".encode()


class EventStream(Response):
    """Sends `events` as they come. A fault on the way becomes a last event with an error."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        ping_seconds: int | float,
        send_seconds: int | float,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._ping_seconds = ping_seconds
        self._send_seconds = send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._send(
            send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        )
        async with contextlib.aclosing(self._parts()) as parts:
            async for part in parts:
                message = {"type": "http.response.body", "body": part, "more_body": True}
                await self._send(send, message)
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._send_seconds):
                await send(message)
        except TimeoutError as error:
            log(logging.WARNING, "the client reads nothing; its stream is ended")
            raise Disconnected from error

    async def _parts(self) -> AsyncGenerator[bytes, None]:
        """The events, comments while they let wait, and the error that ended them, if one did."""
        coming: asyncio.Task[bytes | None] | None = None
        try:
            while True:
                coming = coming or asyncio.create_task(_next(self._events))
                done, _ = await asyncio.wait([coming], timeout=self._ping_seconds)
                if not done:
                    yield PING
                    continue
                part = coming.result()
                if part is None:
                    return
                coming = None
                yield part
        except Exception as error:
            yield _last_event(error)
        finally:
            if coming is not None and not coming.done():
                coming.cancel()
                await asyncio.wait([coming])
            await self._events.aclose()


async def _next(events: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(events, None)


def _last_event(error: Exception) -> bytes:
    status, message, param, code = describe(error)
    if status == 500:
        log(logging.ERROR, "internal error", error=error)
    return event(json.dumps(error_object(status, message, param=param, code=code)))


def stream_response(events: AsyncGenerator[bytes, None], config: ServeConfig) -> EventStream:
    """`events` as a response, with the times `config` sets."""
    return EventStream(events, ping_seconds=config.ping_seconds, send_seconds=config.send_seconds)
