"""POST /v1/responses: run the request as a chat, build the response object or its events.

Errors about fields of the chat are renamed to the fields of this API.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from lowlat.generate.completion import CompletionDelta
from lowlat.serve.chat.output_parser import OutputParser
from lowlat.serve.http.errors import renamed_fields
from lowlat.serve.http.sse import event
from lowlat.serve.protocol.base import WireModel
from lowlat.serve.protocol.response_items import FlatNamedTool, ResponseTool
from lowlat.serve.protocol.sampling import DEFAULT_TEMPERATURE
from lowlat.serve.protocol.structured_outputs import TextFormat
from lowlat.serve.response_store import StoredResponse
from lowlat.serve.routes.chat import submit_chat
from lowlat.serve.routes.context import RequestContext
from lowlat.serve.routes.endpoint import Post
from lowlat.serve.routes.reply import Reply, respond
from lowlat.serve.routes.response_tools import CalledTool
from lowlat.serve.routes.responses_output import Event, Output, OutputItem, dump
from lowlat.serve.routes.responses_request import ResponsesRequest, TextFormatChoice, as_chat
from lowlat.serve.routes.stored_responses import conversation, earlier_items, stored_response


class InputDetails(WireModel):
    cached_tokens: int


class OutputDetails(WireModel):
    reasoning_tokens: int
    """Tokens of the reasoning."""


class ResponseUsage(WireModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(WireModel):
    reason: Literal["max_output_tokens"]


class TextSettings(WireModel):
    format: TextFormatChoice


class ResponseError(WireModel):
    code: str
    message: str


class ResponseObject(WireModel):
    """The output and the settings of a response."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    """Unix time in seconds."""
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None = None
    store: bool
    temperature: float
    text: TextSettings
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool
    tools: list[ResponseTool]
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None


class ResponseEvent(BaseModel):
    """An event of a stream; its other fields depend on the type, as in OpenAI's API."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int


_FIELDS = {
    "messages": "input",
    "prompt": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    # The same name, but functions have another format.
    "tools": "tools",
}
"""Chat field -> field of this API."""


async def create_response(ctx: RequestContext, request: ResponsesRequest) -> Response:
    """Generate a response, streamed if the request asks for it."""
    state, previous, items = ctx.state, None, b""
    if request.previous_response_id is not None:
        previous = stored_response(ctx.state, ctx.cache_namespace, request.previous_response_id)
    earlier = await state.workers.run(earlier_items, previous)
    with renamed_fields(_FIELDS):
        chat, tools = await state.workers.run(as_chat, request, earlier)
        prepared = await submit_chat(ctx, chat, tools.texts)
    if request.store is not False:
        items = await state.workers.run(conversation, earlier, request.items)
    ctx.ignored -= {_FIELDS[name] for name in prepared.used_hints}
    ctx.constraint_field = _FIELDS.get(ctx.constraint_field, ctx.constraint_field)
    reply = ResponsesReply(ctx, request, prepared.make_parser(), tools.called, items)
    return await respond(ctx, reply, stream=request.stream)


RESPONSES = Post(
    path="/v1/responses",
    request=ResponsesRequest,
    response=ResponseObject,
    chunk=ResponseEvent,
    handle=create_response,
)


class ResponsesReply(Reply):
    def __init__(
        self,
        ctx: RequestContext,
        request: ResponsesRequest,
        parser: OutputParser,
        called: Mapping[str, CalledTool],
        items: bytes = b"",
    ) -> None:
        """`called`: see Output. `items`: the conversation to store; empty: nothing is stored."""
        super().__init__(ctx, id_prefix="resp_")
        self._items = items
        self._request = request
        self._parser = parser
        self._output = Output(called)
        self._reasoning_tokens = 0
        self._final_status: Literal["completed", "incomplete"] = "completed"
        self._number = 0

    def add(self, number: int, delta: CompletionDelta) -> Iterable[bytes]:
        events = list(self._take(delta))
        return (self._encode(*event) for event in events)

    def response(self) -> ResponseObject:
        response = self._response(self._final_status)
        self._store(response)
        return response

    def opening(self) -> Iterable[bytes]:
        response = dump(self._response("in_progress"))
        for kind in ("response.created", "response.in_progress"):
            yield self._encode(kind, {"response": response})

    def closing(self) -> Iterable[bytes]:
        response = self.response()
        yield self._encode(f"response.{self._final_status}", {"response": dump(response)})

    def failure(self, status: int, message: str, param: str | None, code: str | None) -> bytes:
        response = self._response("failed")
        code = code or ("server_error" if status >= 500 else "invalid_prompt")
        response.error = ResponseError(code=code, message=message)
        return self._encode("response.failed", {"response": dump(response)})

    def _take(self, delta: CompletionDelta) -> Iterator[Event]:
        before = self._parser.reasoning
        parts = self._parser.push(delta.text)
        # All tokens of a step that contains reasoning count as reasoning tokens.
        if before == "begun" or before != self._parser.reasoning:
            self._reasoning_tokens += len(delta.tokens)
        if delta.finish_reason is not None:
            parts += self._parser.finish()
        for part in parts:
            yield from self._output.push(part)
        if delta.finish_reason is not None:
            self._final_status = "incomplete" if delta.finish_reason == "length" else "completed"
            yield from self._output.close(self._final_status)

    def _response(
        self, status: Literal["in_progress", "completed", "incomplete", "failed"]
    ) -> ResponseObject:
        request = self._request
        text = None if request.text is None else request.text.format
        return ResponseObject(
            id=self._id,
            created_at=self._created,
            status=status,
            incomplete_details=(
                IncompleteDetails(reason="max_output_tokens") if status == "incomplete" else None
            ),
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            model=request.model,
            output=self._output.items,
            previous_response_id=request.previous_response_id,
            store=bool(self._items),
            parallel_tool_calls=request.parallel_tool_calls is not False,
            temperature=(
                DEFAULT_TEMPERATURE if request.temperature is None else request.temperature
            ),
            text=TextSettings(format=text or TextFormat(type="text")),
            tool_choice=request.tool_choice or "auto",
            tools=request.tools or [],
            top_p=1.0 if request.top_p is None else request.top_p,
            usage=None if status == "in_progress" else self._usage(),
            user=request.user,
        )

    def _store(self, response: ResponseObject) -> None:
        if self._items:
            data = response.model_dump_json(by_alias=True).encode()
            stored = StoredResponse(items=self._items, response=data)
            self._ctx.state.responses.put(self._ctx.cache_namespace, self._id, stored)

    def _usage(self) -> ResponseUsage:
        ctx = self._ctx
        return ResponseUsage(
            input_tokens=ctx.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=ctx.cached_tokens),
            output_tokens=ctx.num_tokens,
            output_tokens_details=OutputDetails(reasoning_tokens=self._reasoning_tokens),
            total_tokens=ctx.prompt_tokens + ctx.num_tokens,
        )

    def _encode(self, kind: str, fields: dict[str, object]) -> bytes:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event(json.dumps(data, ensure_ascii=False, separators=(",", ":")), name=kind)
