"""Access log: the outermost middleware. Adds X-Request-Id, a log line and metrics per request.

Also turns unhandled exceptions into 500 responses.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lowlat.serve.generation import Draining
from lowlat.serve.http.body import Disconnected
from lowlat.serve.http.errors import response_to
from lowlat.serve.http.logs import REQUEST_ID, choose_request_id, log

CLIENT_CLOSED_REQUEST = 499
"""Status in logs and metrics when the client disconnected before the response (as in nginx)."""
ID_HEADER = "x-request-id"


class AccessLogMiddleware:
    """ASGI middleware. Calls `count(scope, status, seconds)` for each finished request."""

    def __init__(self, app: ASGIApp, count: Callable[[Scope, int, float], None]) -> None:
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == ID_HEADER.encode()]
        request_id = choose_request_id(given[0].decode("latin-1") if given else None)
        token = REQUEST_ID.set(request_id)
        try:
            await self._observe(scope, receive, send, request_id)
        finally:
            REQUEST_ID.reset(token)

    async def _observe(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        started = time.monotonic()
        status = CLIENT_CLOSED_REQUEST

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", []), (ID_HEADER.encode(), request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Disconnected:
            pass
        except asyncio.CancelledError:
            # The graceful shutdown timed out. A response that has begun breaks off.
            if status == CLIENT_CLOSED_REQUEST:
                await response_to(Draining())(scope, receive, send_with_id)
        except Exception as error:
            log(logging.ERROR, "internal error", error=error)
            if status != CLIENT_CLOSED_REQUEST:
                raise  # The response has begun: the connection must break, or it looks complete.
            await response_to(error)(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - started
            self._count(scope, status, seconds)
            log(
                logging.INFO,
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                seconds=round(seconds, 4),
            )
