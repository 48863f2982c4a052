"""Reply: the response of one API to one request, complete or as a stream of events.

An API implements a Reply; `respond` feeds it the deltas of the request and sends what it builds.
"""

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any, ClassVar, Literal

from pydantic import BaseModel
from pydantic_core import from_json
from starlette.responses import Response

from lowlat.generate.completion import CompletionDelta
from lowlat.serve.http.sse import EVENT_STREAM, PING, EventStreamResponse
from lowlat.serve.protocol.base import WireModel
from lowlat.serve.routes.context import RequestContext
from lowlat.serve.routes.endpoint import json_response


class Reply(ABC):
    """Collects the deltas of a request's completions."""

    media_type: ClassVar[str] = EVENT_STREAM
    ping: ClassVar[bytes] = PING
    """What a stream sends while there is no event; empty: nothing."""

    def __init__(self, ctx: RequestContext, *, id_prefix: str) -> None:
        self._ctx = ctx
        self._id = new_id(id_prefix)
        self._created = int(time.time())
        """Unix time in seconds."""

    @abstractmethod
    def add(self, number: int, delta: CompletionDelta) -> Iterable[bytes]:
        """Add a delta of a completion of prompt `number`; returns its events, built on demand."""

    @abstractmethod
    def opening(self) -> Iterable[bytes]:
        """The events before the first delta."""

    @abstractmethod
    def closing(self) -> Iterable[bytes]:
        """The events after the last delta."""

    @abstractmethod
    def failure(self, status: int, message: str, param: str | None, code: str | None) -> bytes:
        """The last event of a stream that breaks off; arguments as `http.errors.describe` returns
        them.
        """

    @abstractmethod
    def response(self) -> BaseModel:
        """The complete response, after the last delta."""


async def respond(ctx: RequestContext, reply: Reply, *, stream: bool | None) -> Response:
    """The response to the request of `ctx`, whose generations are submitted."""
    if stream:
        return EventStreamResponse(
            _events(ctx, reply),
            ctx.state.config,
            failure=reply.failure,
            ping=reply.ping,
            media_type=reply.media_type,
        )
    async with aclosing(ctx.deltas()) as deltas:
        async for number, delta in deltas:
            reply.add(number, delta)
    if ctx.has_prompt_logprobs:
        return await asyncio.to_thread(lambda: json_response(reply.response()))
    return json_response(reply.response())


async def _events(ctx: RequestContext, reply: Reply) -> AsyncGenerator[bytes, None]:
    if opening := b"".join(reply.opening()):
        yield opening
    async with aclosing(ctx.deltas()) as deltas:
        async for number, delta in deltas:
            if events := b"".join(reply.add(number, delta)):
                yield events
    yield b"".join(reply.closing())


class PromptDetails(WireModel):
    cached_tokens: int
    """Prompt tokens found in the prefix cache."""


class Usage(WireModel):
    prompt_tokens: int
    completion_tokens: int
    """Of all completions, including end-of-sequence tokens and tokens of stop strings."""
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Timings(WireModel):
    """Timings, an extension of OpenAI's format."""

    prefill_seconds: float
    """Time from the prompt's first step to the first token."""
    decode_seconds: float
    """Time from the first token to the last."""
    tokens_per_second: float
    """Decode throughput of all completions together."""


def usage_of(ctx: RequestContext) -> Usage:
    return Usage(
        prompt_tokens=ctx.prompt_tokens,
        completion_tokens=ctx.num_tokens,
        total_tokens=ctx.prompt_tokens + ctx.num_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=ctx.cached_tokens),
    )


def timings_of(ctx: RequestContext) -> Timings:
    return Timings(
        prefill_seconds=round(ctx.prefill_seconds, 6),
        decode_seconds=round(ctx.decode_seconds, 6),
        tokens_per_second=round(ctx.tokens_per_second, 3),
    )


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"


def finish_reason(delta: CompletionDelta) -> Literal["stop", "length"] | None:
    """OpenAI's name of the reason why a completion ended, if it has."""
    if delta.finish_reason is None:
        return None
    return "length" if delta.finish_reason == "length" else "stop"


def parsed_arguments(text: str) -> dict[str, Any]:
    """The arguments of a call; of text that the length limit cut off, what is complete."""
    value = from_json(text, allow_partial=True) if text.strip() else {}
    return value if isinstance(value, dict) else {}
