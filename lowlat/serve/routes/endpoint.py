"""JsonEndpoint: the steps every POST request goes through, from its bytes to its response.

Order: admission, headers, body, JSON, validation, model, handler. A client disconnect cancels the
handler, which aborts its requests.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lowlat.serve.http.body import Disconnected, check_json_headers, parse_object, read_body
from lowlat.serve.http.clients import owners_of
from lowlat.serve.http.errors import API_HEADERS
from lowlat.serve.http.logs import LOG_FIELDS
from lowlat.serve.protocol.base import ApiRequest, GenerationRequest
from lowlat.serve.protocol.errors import ErrorResponse, RequestError
from lowlat.serve.protocol.hints import HEADER, ignored_fields
from lowlat.serve.protocol.validation import validate
from lowlat.serve.routes.context import RequestContext
from lowlat.serve.state import ServerState

Handle = Callable[[RequestContext, Any], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Post:
    """An operation with a JSON body."""

    path: str
    request: type[ApiRequest]
    response: type[BaseModel]
    chunk: type[BaseModel] | None = None
    """Model of a stream's events; None: the operation cannot stream."""
    handle: Handle
    """The handler, called with a valid `request` for a served model."""
    needs_model: bool = True
    """Whether the handler uses the model in memory."""
    error: type[BaseModel] = ErrorResponse
    """Model of error responses."""
    is_ndjson: bool = False
    """Whether a stream is JSON lines, not server-sent events."""
    queries: tuple[bytes, ...] = ()
    """Query strings that are accepted and have no effect."""


def json_response(model: BaseModel) -> Response:
    """`model` as a JSON response."""
    body = model.model_dump_json(by_alias=True)
    return Response(body, media_type="application/json", headers=API_HEADERS)


class JsonEndpoint:
    """ASGI app of one operation."""

    def __init__(self, state: ServerState, operation: Post) -> None:
        self._state = state
        self._operation = operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state, arrived_at = self._state, time.perf_counter()
        state.check_capacity()
        body = await self._read(scope, receive)
        state.check_capacity()
        state.num_requests += 1
        ctx = RequestContext(
            state,
            cache_namespace=scope["state"]["cache_namespace"],
            owner=owners_of(scope)[-1],
            arrived_at=arrived_at,
        )
        try:
            await _while_connected(receive, self._handle_body(ctx, body, scope, receive, send))
        finally:
            scope["state"][LOG_FIELDS] = ctx.log_fields()
            ctx.close()
            state.num_requests -= 1

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        config = self._state.config
        headers = Headers(scope=scope)
        if scope["query_string"] not in (b"", *self._operation.queries):
            raise RequestError("query parameters are not supported; put fields into the body")
        check_json_headers(headers)
        return await read_body(
            receive,
            headers,
            max_bytes=config.max_body_bytes,
            seconds=config.body_seconds,
            bodies=self._state.bodies,
            owners=owners_of(scope),
        )

    async def _handle_body(
        self, ctx: RequestContext, body: bytes, scope: Scope, receive: Receive, send: Send
    ) -> None:
        request, ctx.ignored = await ctx.state.workers.run(_parse, self._operation.request, body)
        if isinstance(request, GenerationRequest):
            ctx.priority, ctx.deadline = request.priority or 0, request.deadline_seconds
        async with ctx.prepare():
            ctx.find_model(request.model)
            if self._operation.needs_model:
                await ctx.load_model()
            response = await self._operation.handle(ctx, request)
        if ctx.ignored:
            response.headers[HEADER] = ", ".join(sorted(ctx.ignored))
        await response(scope, receive, send)


def _parse(kind: type[ApiRequest], body: bytes) -> tuple[ApiRequest, set[str]]:
    """The request, and the paths of its hints without effect."""
    request = validate(kind, parse_object(body))
    return request, ignored_fields(request)


async def _while_connected(receive: Receive, work: Awaitable[None]) -> None:
    """Await `work`. A client disconnect cancels it, which aborts its requests, and raises
    Disconnected.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Disconnected
        working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
