"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API over chats.

Runs the request as a chat; builds the message of content blocks, or its events.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from lowlat.generate.completion import CompletionDelta
from lowlat.generate.model import Model
from lowlat.serve.chat.output_parser import OutputParser
from lowlat.serve.chat.prompt import encode_prompt
from lowlat.serve.chat.template_features import TemplateFeatures
from lowlat.serve.http.errors import ANTHROPIC_PATH, anthropic_error, renamed_fields
from lowlat.serve.http.sse import event
from lowlat.serve.protocol.base import WireModel
from lowlat.serve.protocol.chat import ChatRequest
from lowlat.serve.protocol.errors import ErrorBody
from lowlat.serve.routes.anthropic_request import (
    FIELDS,
    CountTokensRequest,
    MessagesRequest,
    as_chat,
)
from lowlat.serve.routes.chat import submit_chat
from lowlat.serve.routes.context import RequestContext
from lowlat.serve.routes.endpoint import Post, json_response
from lowlat.serve.routes.reply import Reply, parsed_arguments, respond
from lowlat.serve.tool_parsers.state import (
    ContentPart,
    Part,
    ReasoningPart,
    ToolCallArguments,
    ToolCallStart,
)

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextOutput(WireModel):
    type: Literal["text"] = "text"
    text: str = ""


class ThinkingOutput(WireModel):
    type: Literal["thinking"] = "thinking"
    thinking: str = ""
    signature: str = ""
    """Always empty: reasoning that is sent back needs none."""


class ToolUseOutput(WireModel):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any] = Field(default_factory=dict)


ContentBlock = TextOutput | ThinkingOutput | ToolUseOutput


class MessageUsage(WireModel):
    input_tokens: int
    """Prompt tokens that were not found in the prefix cache."""
    cache_creation_input_tokens: int = 0
    """Always 0: caching costs nothing extra."""
    cache_read_input_tokens: int
    """Prompt tokens found in the prefix cache."""
    output_tokens: int


class MessageObject(WireModel):
    """The answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[ContentBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    """The stop sequence that ended the answer."""
    usage: MessageUsage


class MessageEvent(BaseModel):
    """An event of a stream; its other fields depend on the type, as in Anthropic's API."""

    model_config = ConfigDict(extra="allow")

    type: str


class TokenCount(WireModel):
    input_tokens: int


class AnthropicError(WireModel):
    type: Literal["error"] = "error"
    error: ErrorBody


async def create_message(ctx: RequestContext, request: MessagesRequest) -> Response:
    """Continue a conversation, streamed if the request asks for it (Anthropic's API)."""
    with renamed_fields(FIELDS):
        chat = await ctx.state.workers.run(_as_chat, ctx.model, request)
        prepared = await submit_chat(ctx, chat, reduces_max_tokens=True)
    ctx.ignored -= {FIELDS[name] for name in prepared.used_hints}
    if chat.chat_template_kwargs:
        ctx.ignored.discard("thinking")
    ctx.constraint_field = FIELDS.get(ctx.constraint_field, ctx.constraint_field)
    reply = MessagesReply(ctx, request.model, prepared.make_parser())
    return await respond(ctx, reply, stream=request.stream)


async def count_message_tokens(ctx: RequestContext, request: CountTokensRequest) -> Response:
    """Number of tokens of a conversation's prompt (Anthropic's API)."""
    with renamed_fields(FIELDS):
        count = await ctx.state.workers.run(_count, ctx.model, request)
    return json_response(TokenCount(input_tokens=count))


def _as_chat(model: Model, request: CountTokensRequest) -> ChatRequest:
    return as_chat(TemplateFeatures.of(model.tokenizer), request)


def _count(model: Model, request: CountTokensRequest) -> int:
    return len(encode_prompt(model, _as_chat(model, request)))


_QUERIES = (b"beta=true",)
"""Anthropic's clients send it for requests with beta headers."""

MESSAGES = Post(
    path=ANTHROPIC_PATH,
    request=MessagesRequest,
    response=MessageObject,
    chunk=MessageEvent,
    handle=create_message,
    error=AnthropicError,
    queries=_QUERIES,
)
COUNT_TOKENS = Post(
    path=f"{ANTHROPIC_PATH}/count_tokens",
    request=CountTokensRequest,
    response=TokenCount,
    handle=count_message_tokens,
    error=AnthropicError,
    queries=_QUERIES,
)

Event = tuple[str, dict[str, Any]]
"""Type and fields."""


class _Content:
    """The content blocks so far; the last one may still grow."""

    def __init__(self) -> None:
        self.blocks: list[ContentBlock] = []
        self._arguments = ""
        """JSON text of the input of the last block, a tool call."""
        self._is_open = False

    def push(self, part: Part) -> Iterator[Event]:
        """Add `part`; yields its events."""
        match part:
            case ContentPart():
                block = self._last(TextOutput)
                if block is None:
                    block = TextOutput()
                    yield from self._open(block)
                block.text += part.text
                yield self._delta("text_delta", text=part.text)
            case ReasoningPart():
                block = self._last(ThinkingOutput)
                if block is None:
                    block = ThinkingOutput()
                    yield from self._open(block)
                block.thinking += part.text
                yield self._delta("thinking_delta", thinking=part.text)
            case ToolCallStart():
                yield from self._open(ToolUseOutput(id=part.id, name=part.name))
            case ToolCallArguments():
                self._arguments += part.text
                yield self._delta("input_json_delta", partial_json=part.text)

    def close(self) -> Iterator[Event]:
        """Finish the last block if it is open; yields its event."""
        if not self._is_open:
            return
        self._is_open = False
        block = self.blocks[-1]
        if isinstance(block, ToolUseOutput):
            block.input = parsed_arguments(self._arguments)
            self._arguments = ""
        yield "content_block_stop", {"index": len(self.blocks) - 1}

    def _last(self, kind: type[ContentBlock]) -> Any:
        """The last block, if it is open and a `kind`."""
        last = self.blocks[-1] if self._is_open else None
        return last if isinstance(last, kind) else None

    def _open(self, block: ContentBlock) -> Iterator[Event]:
        yield from self.close()
        self.blocks.append(block)
        self._is_open = True
        fields = {"index": len(self.blocks) - 1, "content_block": block.model_dump()}
        yield "content_block_start", fields

    def _delta(self, kind: str, **fields: str) -> Event:
        delta = {"type": kind, **fields}
        return "content_block_delta", {"index": len(self.blocks) - 1, "delta": delta}


class MessagesReply(Reply):
    """Builds the answer of `model` from the deltas of `ctx`."""

    ping: ClassVar[bytes] = event('{"type":"ping"}', name="ping")

    def __init__(self, ctx: RequestContext, model: str, parser: OutputParser) -> None:
        super().__init__(ctx, id_prefix="msg_")
        self._model = model
        self._parser = parser
        self._content = _Content()
        self._stop_reason: StopReason | None = None
        self._stop_sequence: str | None = None

    def add(self, number: int, delta: CompletionDelta) -> Iterable[bytes]:
        events = list(self._take(delta))
        return (_encode(*event) for event in events)

    def response(self) -> MessageObject:
        return MessageObject(
            id=self._id,
            model=self._model,
            content=self._content.blocks,
            stop_reason=self._stop_reason,
            stop_sequence=self._stop_sequence,
            usage=self._usage(),
        )

    def opening(self) -> Iterable[bytes]:
        # How much of the prompt is cached is not known yet; message_delta reports it.
        yield _encode("message_start", {"message": self.response().model_dump()})
        yield self.ping

    def closing(self) -> Iterable[bytes]:
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        yield _encode("message_delta", {"delta": delta, "usage": self._usage().model_dump()})
        yield _encode("message_stop", {})

    def failure(self, status: int, message: str, param: str | None, code: str | None) -> bytes:
        _, body = anthropic_error(status, message, param, code)
        return event(json.dumps(body), name="error")

    def _take(self, delta: CompletionDelta) -> Iterator[Event]:
        parts = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            parts += self._parser.finish()
            self._end(delta)
        for part in parts:
            yield from self._content.push(part)
        if delta.finish_reason is not None:
            yield from self._content.close()

    def _end(self, delta: CompletionDelta) -> None:
        if delta.finish_reason == "length":
            self._stop_reason = "max_tokens"
        elif self._parser.has_tool_calls:
            self._stop_reason = "tool_use"
        elif delta.stop_string is not None:
            self._stop_reason, self._stop_sequence = "stop_sequence", delta.stop_string
        else:
            self._stop_reason = "end_turn"

    def _usage(self) -> MessageUsage:
        ctx = self._ctx
        return MessageUsage(
            input_tokens=ctx.prompt_tokens - ctx.cached_tokens,
            cache_read_input_tokens=ctx.cached_tokens,
            output_tokens=ctx.num_tokens,
        )


def _encode(kind: str, fields: dict[str, Any]) -> bytes:
    data = json.dumps({"type": kind, **fields}, ensure_ascii=False, separators=(",", ":"))
    return event(data, name=kind)
