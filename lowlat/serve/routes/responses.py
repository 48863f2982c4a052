"""POST /v1/responses: run the request as a chat, build the response object or its events.

Errors about fields of the chat are renamed to the fields of this API.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from lowlat.generate.completion import CompletionDelta
from lowlat.serve.chat.output_parser import OutputParser
from lowlat.serve.http.errors import renamed_fields
from lowlat.serve.http.sse import event
from lowlat.serve.protocol.base import WireModel
from lowlat.serve.protocol.sampling import DEFAULT_TEMPERATURE
from lowlat.serve.protocol.structured_outputs import TextFormat
from lowlat.serve.routes.chat import submit_chat
from lowlat.serve.routes.context import RequestContext
from lowlat.serve.routes.endpoint import Post
from lowlat.serve.routes.reply import Reply, new_id, respond
from lowlat.serve.routes.responses_request import (
    FlatFunction,
    FlatNamedTool,
    ItemStatus,
    ResponsesRequest,
    TextFormatChoice,
    as_chat,
)
from lowlat.serve.tool_parsers.state import (
    ContentPart,
    Part,
    ReasoningPart,
    ToolCallArguments,
    ToolCallStart,
)


class OutputTextPart(WireModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[str] = Field(default_factory=list)
    logprobs: list[str] = Field(default_factory=list)


class ReasoningTextPart(WireModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class MessageItem(WireModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: ItemStatus = "in_progress"
    content: list[OutputTextPart] = Field(default_factory=list)


class ReasoningItem(WireModel):
    id: str
    type: Literal["reasoning"] = "reasoning"
    summary: list[str] = Field(default_factory=list)
    status: ItemStatus = "in_progress"
    content: list[ReasoningTextPart] = Field(default_factory=list)


class FunctionCallItem(WireModel):
    id: str
    type: Literal["function_call"] = "function_call"
    status: ItemStatus = "in_progress"
    call_id: str
    name: str
    arguments: str = ""


OutputItem = MessageItem | ReasoningItem | FunctionCallItem


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
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float
    text: TextSettings
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool
    tools: list[FlatFunction]
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
    with renamed_fields(_FIELDS):
        chat = await ctx.state.workers.run(as_chat, request)
        prepared = await submit_chat(ctx, chat)
    ctx.ignored -= {_FIELDS[name] for name in prepared.used_hints}
    ctx.constraint_field = _FIELDS.get(ctx.constraint_field, ctx.constraint_field)
    reply = ResponsesReply(ctx, request, prepared.make_parser())
    return await respond(ctx, reply, stream=request.stream)


RESPONSES = Post(
    path="/v1/responses",
    request=ResponsesRequest,
    response=ResponseObject,
    chunk=ResponseEvent,
    handle=create_response,
)


Event = tuple[str, dict[str, Any]]
"""Type and fields."""


class Output:
    """The output items so far; the last one may still grow."""

    def __init__(self) -> None:
        self.items: list[OutputItem] = []
        self._is_open = False

    def push(self, part: Part) -> Iterator[Event]:
        """Add `part`; yields its events."""
        match part:
            case ContentPart():
                if not (self._is_open and isinstance(self.items[-1], MessageItem)):
                    text = OutputTextPart(text="")
                    yield from self._open(MessageItem(id=new_id("msg_"), content=[text]))
                yield self._grow(part.text)
            case ReasoningPart():
                if not (self._is_open and isinstance(self.items[-1], ReasoningItem)):
                    text = ReasoningTextPart(text="")
                    yield from self._open(ReasoningItem(id=new_id("rs_"), content=[text]))
                yield self._grow(part.text)
            case ToolCallStart():
                item = FunctionCallItem(id=new_id("fc_"), call_id=part.id, name=part.name)
                yield from self._open(item)
            case ToolCallArguments():
                item = self.items[-1]
                assert isinstance(item, FunctionCallItem)
                item.arguments += part.text
                yield self._event("response.function_call_arguments.delta", delta=part.text)

    def close(self, status: ItemStatus = "completed") -> Iterator[Event]:
        """Finish the last item if it is open; yields its events."""
        if not self._is_open:
            return
        self._is_open = False
        item = self.items[-1]
        item.status = status
        if isinstance(item, FunctionCallItem):
            fields = {"name": item.name, "arguments": item.arguments}
            yield self._event("response.function_call_arguments.done", **fields)
        else:
            part = item.content[0]
            yield self._text_event(part, "done", text=part.text)
            yield self._part_event("done", part)
        yield self._item_event("done", _dump(item))

    def _open(self, item: OutputItem) -> Iterator[Event]:
        yield from self.close()
        self.items.append(item)
        self._is_open = True
        if isinstance(item, FunctionCallItem):
            yield self._item_event("added", _dump(item))
        else:
            # Its part is added by an event of its own.
            yield self._item_event("added", {**_dump(item), "content": []})
            yield self._part_event("added", item.content[0])

    def _grow(self, text: str) -> Event:
        item = self.items[-1]
        assert not isinstance(item, FunctionCallItem)
        part = item.content[0]
        part.text += text
        return self._text_event(part, "delta", delta=text)

    def _text_event(
        self, part: OutputTextPart | ReasoningTextPart, kind: str, **fields: object
    ) -> Event:
        more = {"logprobs": []} if isinstance(part, OutputTextPart) else {}
        return self._event(f"response.{part.type}.{kind}", content_index=0, **fields, **more)

    def _part_event(self, kind: str, part: BaseModel) -> Event:
        return self._event(f"response.content_part.{kind}", content_index=0, part=_dump(part))

    def _item_event(self, kind: str, item: dict[str, Any]) -> Event:
        fields = {"output_index": len(self.items) - 1, "item": item}
        return f"response.output_item.{kind}", fields

    def _event(self, kind: str, **fields: object) -> Event:
        """An event about the last item."""
        last = len(self.items) - 1
        return kind, {"item_id": self.items[last].id, "output_index": last, **fields}


def _dump(model: BaseModel) -> dict[str, Any]:
    return model.model_dump(by_alias=True)


class ResponsesReply(Reply):
    def __init__(
        self, ctx: RequestContext, request: ResponsesRequest, parser: OutputParser
    ) -> None:
        super().__init__(ctx, id_prefix="resp_")
        self._request = request
        self._parser = parser
        self._output = Output()
        self._reasoning_tokens = 0
        self._final_status: Literal["completed", "incomplete"] = "completed"
        self._number = 0

    def add(self, number: int, delta: CompletionDelta) -> Iterable[bytes]:
        events = list(self._take(delta))
        return (self._encode(*event) for event in events)

    def response(self) -> ResponseObject:
        return self._response(self._final_status)

    def opening(self) -> Iterable[bytes]:
        response = _dump(self._response("in_progress"))
        for kind in ("response.created", "response.in_progress"):
            yield self._encode(kind, {"response": response})

    def closing(self) -> Iterable[bytes]:
        response = _dump(self._response(self._final_status))
        yield self._encode(f"response.{self._final_status}", {"response": response})

    def failure(self, status: int, message: str, param: str | None, code: str | None) -> bytes:
        response = self._response("failed")
        code = code or ("server_error" if status >= 500 else "invalid_prompt")
        response.error = ResponseError(code=code, message=message)
        return self._encode("response.failed", {"response": _dump(response)})

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
