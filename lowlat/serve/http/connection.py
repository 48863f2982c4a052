"""Connection limits: uvicorn's HTTP/1.1 protocol with a connection limit, timeouts and JSON errors.

Handles what happens before a request exists (too many connections, slow headers, invalid HTTP) and
after its response: unread bodies and clients that read nothing are cut off.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from typing import Any

import h11
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from lowlat.serve.config import ServeConfig
from lowlat.serve.http.clients import UNKNOWN_ADDRESS
from lowlat.serve.http.connection_pool import Closable, ConnectionPool
from lowlat.serve.http.errors import RETRY_SECONDS, error_object
from lowlat.serve.http.logs import log
from lowlat.serve.protocol import limits

READ_BYTES = 8192
"""Bytes read from a connection at once."""
LINGER_SECONDS = 2.0
"""How long an unread body is drained. Closing a connection with bytes in flight sends a reset, and
the client may then lose the response.
"""
_CLOSE = (b"connection", b"close")


class Connection(H11Protocol, Closable):
    """Enforces `header_seconds` for a request's line and headers, `send_seconds` for reading.

    uvicorn's keep-alive timeout limits the time between requests.
    """

    _bounds: ServeConfig
    _pool: ConnectionPool
    _timer: asyncio.TimerHandle | None = None
    _abort_timer: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._inner = self.app
        self.app = self._call_app

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        # A loop iteration then parses little: a body may come in chunks of one byte each.
        transport.max_size = READ_BYTES  # pyright: ignore[reportAttributeAccessIssue]
        if not self._pool.admit(self):
            log(logging.WARNING, "connection refused: too many connections")
            self._refuse(503, "too many connections; try again later", code="overloaded")
        else:
            self._timer = self.loop.call_later(self._bounds.header_seconds, self._time_out)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._awaits_headers():
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._bounds.header_seconds, self._time_out)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_abort()
        self._pool.remove(self)
        super().connection_lost(exc)

    def eof_received(self) -> None:
        super().eof_received()
        self._abort_later()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._abort_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_abort()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abort_later()

    def send_400_response(self, msg: str) -> None:
        if len(self.conn.trailing_data[0]) > limits.MAX_HEADER_BYTES:
            most = limits.MAX_HEADER_BYTES
            self._refuse(431, f"the request's line and headers are larger than {most} bytes")
        else:
            self._refuse(400, "invalid HTTP/1.1 request")

    def on_response_complete(self) -> None:
        self._pool.mark_idle(self)
        super().on_response_complete()

    @property
    def address(self) -> str:
        return UNKNOWN_ADDRESS if self.client is None else self.client[0]

    def close_idle(self) -> None:
        log(logging.INFO, "idle connection closed: too many connections", client=self.address)
        self._stop_timer()
        self.transport.close()
        self._abort_later()

    async def _call_app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app. A response before the end of the request closes the connection."""
        self._pool.mark_busy(self)
        is_early = is_over = False

        async def watched(message: Message) -> None:
            nonlocal is_early, is_over
            if message["type"] == "http.response.start":
                is_early = self.conn.their_state is h11.SEND_BODY
                message = _with_close(message) if is_early else message
            elif is_early:
                is_over = not message.get("more_body", False)
                message = {**message, "more_body": True}
            await send(message)

        await self._inner(scope, receive, watched)
        if is_over:
            await _discard(receive)
            # This ends the response for uvicorn, which then closes the connection.
            await send({"type": "http.response.body", "body": b""})
        if self.transport.is_closing():
            self._abort_later()

    def _awaits_headers(self) -> bool:
        return self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            seconds = self._bounds.header_seconds
            self._refuse(408, f"the headers did not arrive within {seconds:g} seconds")

    def _refuse(self, status: int, message: str, *, code: str | None = None) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_raw_error(self.conn.send, status, message, code))
        self.transport.close()
        self._abort_later()

    def _abort_later(self) -> None:
        """Abort the connection after `send_seconds` unless the client reads in the meantime."""
        self._stop_abort()
        left = self.transport.get_write_buffer_size()
        if left:
            self._abort_timer = self.loop.call_later(self._bounds.send_seconds, self._abort, left)

    def _stop_abort(self) -> None:
        if self._abort_timer is not None:
            self._abort_timer.cancel()
            self._abort_timer = None

    def _abort(self, left: int) -> None:
        if self.transport.get_write_buffer_size() < left:
            self._abort_later()
        else:
            log(logging.WARNING, "connection aborted: the client does not read")
            self.transport.abort()


def connection_class(config: ServeConfig, pool: ConnectionPool) -> type[H11Protocol]:
    """The protocol class for uvicorn, which creates one object per connection."""

    class Bounded(Connection):
        _bounds = config
        _pool = pool

    return Bounded


def _with_close(message: Message) -> Message:
    headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != _CLOSE[0]]
    return {**message, "headers": [*headers, _CLOSE]}


async def _discard(receive: Receive) -> None:
    """Drain the rest of a body for at most LINGER_SECONDS."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while (await receive()).get("more_body", False):
                pass


def _raw_error(
    encode: Callable[[h11.Event], bytes | None], status: int, message: str, code: str | None
) -> bytes:
    body = json.dumps(error_object(status, message, code=code)).encode()
    headers = [
        ("content-type", "application/json"),
        ("content-length", str(len(body))),
        ("connection", "close"),
    ]
    if status == 503:
        headers.append(("retry-after", str(RETRY_SECONDS)))
    events = (
        h11.Response(status_code=status, headers=headers),
        h11.Data(data=body),
        h11.EndOfMessage(),
    )
    return b"".join(encode(event) or b"" for event in events)
