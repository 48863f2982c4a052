"""JsonEndpoint: the way of a request with a JSON body, from its bytes to the last of its answer.

Owns the order (room, headers, body, JSON, fields, work) and that work ends when the client leaves.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lowlat.serve.http.body import Disconnected, check_json_headers, parse_object, read_body
from lowlat.serve.http.errors import API_HEADERS
from lowlat.serve.protocol.base import StrictModel
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.validation import validate
from lowlat.serve.routes.context import Call
from lowlat.serve.state import Services

Body = TypeVar("Body", bound=StrictModel)


def json_response(model: BaseModel) -> Response:
    """A response model as a response."""
    body = model.model_dump_json(by_alias=True)
    return Response(body, media_type="application/json", headers=API_HEADERS)


class JsonEndpoint(Generic[Body]):
    """ASGI app of one route: a `kind` in, whatever `handle` makes of it out."""

    def __init__(
        self,
        services: Services,
        kind: type[Body],
        handle: Callable[[Call, Body], Awaitable[Response]],
    ) -> None:
        self._services = services
        self._kind = kind
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services = self._services
        services.check_room()
        services.num_requests += 1
        call = Call(services, cache_namespace=scope["state"]["cache_namespace"])
        try:
            body = await self._read(scope, receive)
            await _while_connected(receive, self._answer(call, body, scope, receive, send))
        finally:
            call.close()
            services.num_requests -= 1

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        config = self._services.config
        headers = Headers(scope=scope)
        if scope["query_string"]:
            raise RequestError("this path takes no query parameters; put fields into the body")
        check_json_headers(headers)
        return await read_body(
            receive, headers, max_bytes=config.max_body_bytes, seconds=config.body_seconds
        )

    async def _answer(
        self, call: Call, body: bytes, scope: Scope, receive: Receive, send: Send
    ) -> None:
        request = await call.services.workers.run(_parse, self._kind, body)
        async with call.prepare(getattr(request, "deadline_seconds", None)):
            response = await self._handle(call, request)
        await response(scope, receive, send)


def _parse(kind: type[Body], body: bytes) -> Body:
    return validate(kind, parse_object(body))


async def _while_connected(receive: Receive, work: Awaitable[None]) -> None:
    """Await `work`; cancelled, and Disconnected raised, where the client leaves before its end."""
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
