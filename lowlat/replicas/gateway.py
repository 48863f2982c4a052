"""The HTTP gateway of a Ray Serve application: forwards requests to replicas, and repeats those
whose replica is lost or refuses them.

A request is repeated only before the first byte of its response has been sent.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ray.exceptions import NodeDiedError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from lowlat.replicas.messages import ReplicaRequest, ResponseHead
from lowlat.replicas.metrics import merge_metrics
from lowlat.replicas.options import ReplicaOptions
from lowlat.replicas.prefix import Prefix, prefix_of
from lowlat.serve.config import is_loopback
from lowlat.serve.http.errors import (
    ANTHROPIC_PATH,
    OLLAMA_PATHS,
    error_response,
    errors_of,
    format_of,
)
from lowlat.serve.http.logs import configure, log
from lowlat.serve.http.sse import event

ATTEMPTS = 4
"""Replicas that may be lost under one request."""
REPLICA_LOST = (RayActorError, NodeDiedError, WorkerCrashedError, ReplicaUnavailableError)
_SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string")
_KEYS = (b"authorization", b"x-api-key", b"cookie")
_STORED = "/v1/responses"


class Gateway:
    """Forwards HTTP requests as they are: replicas check keys, hosts and bodies."""

    def __init__(self, replicas: DeploymentHandle, options: ReplicaOptions) -> None:
        configure()
        self._replicas = replicas
        self._handle = replicas.options(method_name="handle", stream=True)
        self._config = options.serve_config()

    async def __call__(self, request: Request) -> Response:
        with errors_of(request.url.path):
            if not self._config.api_keys and not is_loopback(_server(request)):
                return error_response(
                    403, "Ray Serve listens on an address of the network; set api_key_file"
                )
            try:
                async with asyncio.timeout(self._config.body_seconds):
                    body = await self._read_body(request)
            except TimeoutError:
                return error_response(408, "the body took too long to arrive")
            if body is None:
                return error_response(
                    413, f"the body is larger than {self._config.max_body_bytes} bytes"
                )
            forwarded = _forwarded(request, body)
            if request.url.path == "/metrics" and request.method == "GET":
                return await self._metrics(forwarded)
            return await self._forward(forwarded)

    async def _read_body(self, request: Request) -> bytes | None:
        """None if it is larger than max_body_bytes."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._config.max_body_bytes:
                return None
        return bytes(body)

    async def _forward(self, request: ReplicaRequest) -> Response:
        for _ in range(ATTEMPTS):
            parts = self._send(request)
            try:
                head = await _first(parts)
                while _may_differ(head, request) and head.replica not in request.tried:
                    request = replace(request, tried=(*request.tried, head.replica))
                    parts = self._send(request)
                    head = await _first(parts)
            except REPLICA_LOST as error:
                log(logging.WARNING, "a replica was lost; the request is repeated", error=error)
                continue
            return _response(head, parts, str(request.scope["path"]))
        return error_response(
            503,
            "replicas of the model were lost repeatedly; try again later",
            code="replica_lost",
            headers={"Retry-After": "5"},
        )

    def _send(self, request: ReplicaRequest) -> DeploymentResponseGenerator:
        parts = self._handle.remote(request)
        assert isinstance(parts, DeploymentResponseGenerator)
        return parts

    async def _metrics(self, request: ReplicaRequest) -> Response:
        """The metrics of all replicas, with the replica as a label."""
        try:
            found = await self._replicas.broadcast("metrics", request).results_async()
        except (*REPLICA_LOST, TimeoutError) as error:
            log(logging.WARNING, "a replica was lost; metrics are incomplete", error=error)
            return error_response(503, "a replica was lost; try again", code="replica_lost")
        texts: dict[str, str] = {}
        for head, body in found:
            if head.status != 200:
                return _with_headers(Response(body, head.status), head)
            texts[head.replica] = body.decode()
        return merge_metrics(texts)


async def _first(parts: DeploymentResponseGenerator) -> ResponseHead:
    """The head of a response. A caller that is cancelled cancels the request."""
    try:
        return await anext(parts)
    except BaseException:
        parts.cancel()
        raise


def _response(head: ResponseHead, parts: DeploymentResponseGenerator, path: str) -> Response:
    async def body() -> AsyncGenerator[bytes, None]:
        try:
            yield head.body
            async for part in parts:
                yield part
        except REPLICA_LOST as error:
            log(logging.ERROR, "a replica was lost; its stream breaks off", error=error)
            yield _last_event(path)
        finally:
            parts.cancel()

    return _with_headers(_Stream(body(), head.status), head)


def _last_event(path: str) -> bytes:
    """The error at the end of a stream that breaks off, in the format of its API."""
    _, body = format_of(path)(503, "the replica was lost", None, "replica_lost")
    text = json.dumps(body)
    if path.startswith(OLLAMA_PATHS):
        return f"{text}\n".encode()
    return event(text, name="error" if path.startswith(ANTHROPIC_PATH) else None)


class _Stream(StreamingResponse):
    """Closes its generator when the client has left."""

    async def stream_response(self, send: Any) -> None:
        async with aclosing(self.body_iterator):  # pyright: ignore[reportArgumentType]
            await super().stream_response(send)


def _with_headers(response: Response, head: ResponseHead) -> Response:
    response.raw_headers = head.headers
    return response


def _may_differ(head: ResponseHead, request: ReplicaRequest) -> bool:
    """Whether another replica may serve a request that this one has refused: it is full or drains
    (529: Anthropic's 503), or stored responses are on another one."""
    is_stored = str(request.scope["path"]).startswith(_STORED)
    return head.status in (429, 503, 529) or (head.status == 404 and is_stored)


def _forwarded(request: Request, body: bytes) -> ReplicaRequest:
    scope = {name: request.scope[name] for name in _SCOPE if name in request.scope}
    scope["headers"] = [(bytes(name), bytes(value)) for name, value in request.scope["headers"]]
    scope["client"] = None if request.client is None else tuple(request.client)
    keys = b"\0".join(value for name, value in scope["headers"] if name in _KEYS)
    prefix = prefix_of(body, keys) if body else Prefix()
    return ReplicaRequest(scope={"root_path": "", **scope}, body=body, prefix=prefix)


def _server(request: Request) -> str:
    """The address of this machine that the client has connected to."""
    server = request.scope.get("server")
    return "" if server is None else str(server[0])
