"""Server-sent events (SSE): streaming responses with keep-alive comments and a send timeout.

Detecting a disconnected client is in `routes.endpoint`, for all responses.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Callable

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from lowlat.serve.config import ServeConfig
from lowlat.serve.http.body import Disconnected
from lowlat.serve.http.errors import describe, error_object
from lowlat.serve.http.logs import log

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
EVENT_STREAM = "text/event-stream"


def event(data: str, *, name: str | None = None) -> bytes:
    """One server-sent event; `data` is JSON in one line."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {data}\n\n".encode()


def error_event(status: int, message: str, param: str | None, code: str | None) -> bytes:
    """An error object as an event, in OpenAI's format."""
    return event(json.dumps(error_object(status, message, param=param, code=code)))


class EventStreamResponse(Response):
    """Sends `events` as they arrive, with the timeouts of `config`.

    An exception becomes a final event, which `failure` builds of its description.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        config: ServeConfig,
        *,
        failure: Callable[[int, str, str | None, str | None], bytes] = error_event,
        ping: bytes = PING,
        media_type: str = EVENT_STREAM,
    ) -> None:
        """ping: what is sent while there is no event; empty: nothing."""
        super().__init__(
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}, media_type=media_type
        )
        del self.headers["content-length"]
        self._events = events
        self._config = config
        self._failure = failure
        self._keep_alive = ping
        self._is_silent = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await self._send(send, start)
        pinging = asyncio.create_task(self._ping(send))
        try:
            async with contextlib.aclosing(self._events) as events:
                await self._send_all(send, events)
        finally:
            pinging.cancel()
            await asyncio.wait([pinging])
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send, events: AsyncGenerator[bytes, None]) -> None:
        try:
            async for part in events:
                self._is_silent = False
                await self._send_part(send, part)
        except Disconnected:
            raise
        except Exception as error:
            description = describe(error)
            if description[0] == 500:
                log(logging.ERROR, "internal error", error=error)
            await self._send_part(send, self._failure(*description))

    async def _ping(self, send: Send) -> None:
        """Send the ping, if there is one, whenever nothing was sent for `ping_seconds`."""
        if not self._keep_alive:
            return
        with contextlib.suppress(Disconnected):
            while True:
                self._is_silent = True
                await asyncio.sleep(self._config.ping_seconds)
                if self._is_silent:
                    await self._send_part(send, self._keep_alive)

    async def _send_part(self, send: Send, part: bytes) -> None:
        await self._send(send, {"type": "http.response.body", "body": part, "more_body": True})

    async def _send(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._config.send_seconds):
                await send(message)
        except TimeoutError as error:
            log(logging.WARNING, "stream aborted: the client does not read")
            raise Disconnected from error
