"""POST /v1/responses: run the request as a chat, build the response object or its events.

Errors about fields of the chat are renamed to the fields of this API.
"""

import json
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Literal

from starlette.responses import Response

from lowlat.generate.completion import CompletionDelta
from lowlat.serve.chat.output_parser import OutputParser
from lowlat.serve.http.errors import describe, renamed_fields
from lowlat.serve.http.logs import log
from lowlat.serve.http.sse import event, stream_response
from lowlat.serve.protocol import responses_output as wire
from lowlat.serve.protocol.responses import ResponsesRequest
from lowlat.serve.protocol.sampling import DEFAULT_TEMPERATURE
from lowlat.serve.protocol.structured_outputs import TextFormat
from lowlat.serve.routes.chat import submit_chat
from lowlat.serve.routes.context import RequestContext
from lowlat.serve.routes.endpoint import json_response
from lowlat.serve.routes.response_fields import new_id, now
from lowlat.serve.routes.responses_input import as_chat
from lowlat.serve.routes.responses_output import Event, Output

_FIELDS = {
    "messages": "input",
    "prompt": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    # The same name, but functions have another format.
    "tools": "tools",
}
"""Chat field -> field of this API."""


async def create_response(ctx: RequestContext, request: ResponsesRequest) -> Response:
    """Generate a response, streamed if the request asks for it."""
    ctx.state.check_model(request.model)
    with renamed_fields(_FIELDS):
        chat = await ctx.state.workers.run(as_chat, request)
        prepared = await submit_chat(ctx, chat)
    ctx.constraint_field = _FIELDS.get(ctx.constraint_field, ctx.constraint_field)
    reply = ResponsesBuilder(ctx, request, prepared.make_parser())
    if request.stream:
        return stream_response(reply.events(), ctx.state.config)
    return json_response(await reply.complete())


class ResponsesBuilder:
    """Builds the response to `request` from the deltas of `ctx`."""

    def __init__(
        self, ctx: RequestContext, request: ResponsesRequest, parser: OutputParser
    ) -> None:
        self._ctx = ctx
        self._request = request
        self._parser = parser
        self._id = new_id("resp_")
        self._created = now()
        self._output = Output()
        self._reasoning_tokens = 0
        self._is_truncated = False
        self._number = 0

    async def complete(self) -> wire.ResponseObject:
        """The complete response object."""
        async with aclosing(self._ctx.deltas()) as deltas:
            async for _, delta in deltas:
                for _ in self._take(delta):
                    pass
        return self._response(self._final_status)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The response as SSE events; an exception becomes the event response.failed."""
        yield self._status_event("response.created", "in_progress")
        yield self._status_event("response.in_progress", "in_progress")
        try:
            async with aclosing(self._ctx.deltas()) as deltas:
                async for _, delta in deltas:
                    if chunk := b"".join(self._encode(*gain) for gain in self._take(delta)):
                        yield chunk
        except Exception as error:
            yield self._failed(error)
            return
        yield self._status_event(f"response.{self._final_status}", self._final_status)

    def _take(self, delta: CompletionDelta) -> Iterator[Event]:
        before = self._parser.reasoning
        parts = self._parser.push(delta.text)
        # All tokens of a step that contains reasoning count as reasoning tokens.
        if before == "begun" or before != self._parser.reasoning:
            self._reasoning_tokens += len(delta.tokens)
        if delta.finish_reason is not None:
            parts = [*parts, *self._parser.finish()]
        for part in parts:
            yield from self._output.push(part)
        if delta.finish_reason is not None:
            self._is_truncated = delta.finish_reason == "length"
            yield from self._output.close("incomplete" if self._is_truncated else "completed")

    @property
    def _final_status(self) -> Literal["completed", "incomplete"]:
        return "incomplete" if self._is_truncated else "completed"

    def _response(
        self, status: Literal["in_progress", "completed", "incomplete", "failed"]
    ) -> wire.ResponseObject:
        request = self._request
        text = None if request.text is None else request.text.format
        return wire.ResponseObject(
            id=self._id,
            created_at=self._created,
            status=status,
            incomplete_details=(
                wire.IncompleteDetails(reason="max_output_tokens")
                if status == "incomplete"
                else None
            ),
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            model=request.model,
            output=self._output.items,
            parallel_tool_calls=request.parallel_tool_calls is not False,
            temperature=(
                DEFAULT_TEMPERATURE if request.temperature is None else request.temperature
            ),
            text=wire.TextSettings(format=text or TextFormat(type="text")),
            tool_choice=request.tool_choice or "auto",
            tools=request.tools or [],
            top_p=1.0 if request.top_p is None else request.top_p,
            usage=None if status == "in_progress" else self._usage(),
            user=request.user,
        )

    def _usage(self) -> wire.ResponseUsage:
        ctx = self._ctx
        return wire.ResponseUsage(
            input_tokens=ctx.prompt_tokens,
            input_tokens_details=wire.InputDetails(cached_tokens=ctx.cached_tokens),
            output_tokens=ctx.num_tokens,
            output_tokens_details=wire.OutputDetails(reasoning_tokens=self._reasoning_tokens),
            total_tokens=ctx.prompt_tokens + ctx.num_tokens,
        )

    def _status_event(
        self, kind: str, status: Literal["in_progress", "completed", "incomplete"]
    ) -> bytes:
        response = self._response(status).model_dump(by_alias=True)
        return self._encode(kind, {"response": response})

    def _failed(self, error: Exception) -> bytes:
        status, message, _, code = describe(error)
        if status == 500:
            log(logging.ERROR, "internal error", error=error)
        response = self._response("failed")
        code = code or ("server_error" if status >= 500 else "invalid_prompt")
        response.error = wire.ResponseError(code=code, message=message)
        return self._encode("response.failed", {"response": response.model_dump(by_alias=True)})

    def _encode(self, kind: str, fields: dict[str, object]) -> bytes:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event(json.dumps(data, ensure_ascii=False, separators=(",", ":")), name=kind)
