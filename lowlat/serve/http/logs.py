"""Structured logging: one JSON object per line on stderr, with the request id; access log.

Lines have the client's address, a fingerprint of its key, token counts and timings. Prompts,
responses, API keys and query strings are never logged.
"""

import asyncio
import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lowlat.serve.generation import Draining
from lowlat.serve.http.body import Disconnected
from lowlat.serve.http.clients import client_address, key_fingerprint
from lowlat.serve.http.errors import errors_of, response_to

LOGGER = logging.getLogger("lowlat.serve")
REQUEST_ID: ContextVar[str | None] = ContextVar("lowlat_request_id", default=None)
_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_FIELDS = "fields"
CLIENT_CLOSED_REQUEST = 499
"""Status in logs and metrics when the client disconnected before the response (as in nginx)."""
ID_HEADER = "x-request-id"
LOG_FIELDS = "log_fields"
"""Key of scope["state"] for fields that a route adds to the line of its request."""


class JsonFormatter(logging.Formatter):
    """A record as one JSON line: time (UTC), level, message, request_id, fields of `log`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = REQUEST_ID.get()
        if request_id is not None:
            line["request_id"] = request_id
        line.update(record.__dict__.get(_FIELDS, {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log(level: int, message: str, *, error: BaseException | None = None, **fields: object) -> None:
    """Log `message` with `fields` (JSON types); `error` adds its traceback."""
    LOGGER.log(level, message, exc_info=error, extra={_FIELDS: fields})


def choose_request_id(given: str | None) -> str:
    """The client's X-Request-Id if it consists of letters, digits and `._-`, else a new id."""
    if given is not None and _ACCEPTED_ID.fullmatch(given):
        return given
    return f"req-{uuid.uuid4().hex}"


def configure(level: int = logging.INFO) -> None:
    """Send all logs of this process to stderr as JSON, those of uvicorn from ERROR up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Below ERROR, uvicorn logs every malformed request and every startup and shutdown step.
    logging.getLogger("uvicorn").setLevel(max(level, logging.ERROR))


class AccessLogMiddleware:
    """The outermost ASGI middleware: adds X-Request-Id and a log line, and calls
    `count(scope, status, seconds)` for each finished request. Also turns unhandled exceptions into
    500 responses.
    """

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
            with errors_of(scope["path"]):
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
                client=client_address(scope),
                key=key_fingerprint(scope),
                **scope.get("state", {}).get(LOG_FIELDS, {}),
            )
