"""Ollama's API: POST /api/chat and /api/generate.

Runs chats and prompts as chats and completions; answers stream as JSON lines (NDJSON).
"""

from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import BaseModel, Field
from starlette.responses import Response

from lowlat.generate.completion import CompletionDelta, TokenLogprob
from lowlat.generate.model import Model
from lowlat.serve.chat.output_parser import OutputParser
from lowlat.serve.chat.template_features import TemplateFeatures
from lowlat.serve.http.errors import ollama_error, renamed_fields
from lowlat.serve.protocol.base import WireModel, is_none
from lowlat.serve.protocol.chat import ChatRequest
from lowlat.serve.routes.chat import ChatLogprob, chat_logprob, submit_chat
from lowlat.serve.routes.completions import submit_completion
from lowlat.serve.routes.context import RequestContext
from lowlat.serve.routes.endpoint import Post, json_response
from lowlat.serve.routes.ollama_models import OllamaError, timestamp
from lowlat.serve.routes.ollama_request import (
    FIELDS,
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaRequest,
    chat_of,
    completion_of,
    prompt_chat_of,
)
from lowlat.serve.routes.reply import Reply, parsed_arguments, respond
from lowlat.serve.tool_parsers.state import (
    ContentPart,
    Part,
    ReasoningPart,
    ToolCallArguments,
    ToolCallStart,
)


class FunctionOutput(WireModel):
    index: int
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class ToolCallOutput(WireModel):
    id: str
    function: FunctionOutput


class MessageOutput(WireModel):
    role: str = "assistant"
    content: str = ""
    thinking: str | None = Field(default=None, exclude_if=is_none)
    tool_calls: list[ToolCallOutput] | None = Field(default=None, exclude_if=is_none)


class OllamaReply(WireModel):
    """A whole answer, or a line of a stream. Durations are in nanoseconds; with done only."""

    model: str
    created_at: str
    done: bool
    done_reason: str | None = Field(default=None, exclude_if=is_none)
    """stop, length, or load if there was nothing to answer."""
    logprobs: list[ChatLogprob] | None = Field(default=None, exclude_if=is_none)
    total_duration: int | None = Field(default=None, exclude_if=is_none)
    load_duration: int | None = Field(default=None, exclude_if=is_none)
    prompt_eval_count: int | None = Field(default=None, exclude_if=is_none)
    """Tokens of the prompt."""
    prompt_eval_duration: int | None = Field(default=None, exclude_if=is_none)
    eval_count: int | None = Field(default=None, exclude_if=is_none)
    """Generated tokens."""
    eval_duration: int | None = Field(default=None, exclude_if=is_none)


class OllamaChat(OllamaReply):
    message: MessageOutput


class OllamaGeneration(OllamaReply):
    response: str
    thinking: str | None = Field(default=None, exclude_if=is_none)


async def ollama_chat(ctx: RequestContext, request: OllamaChatRequest) -> Response:
    """Complete a chat, streamed unless stream is false (Ollama's API)."""
    if not request.messages:
        return json_response(OllamaChat(message=MessageOutput(), **_loaded(request)))
    with renamed_fields(FIELDS):
        chat = await ctx.state.workers.run(_as_chat, ctx.model, request)
        prepared = await submit_chat(ctx, chat, reduces_max_tokens=True)
    _note_think(ctx, request, bool(chat.chat_template_kwargs or prepared.used_hints))
    return await _respond(ctx, ChatLines(ctx, request, prepared.make_parser()), request)


async def ollama_generate(ctx: RequestContext, request: OllamaGenerateRequest) -> Response:
    """Answer or continue a prompt, streamed unless stream is false (Ollama's API)."""
    if not request.prompt:
        return json_response(OllamaGeneration(response="", **_loaded(request)))
    if request.is_plain or ctx.model.tokenizer.chat_template is None:
        with renamed_fields(FIELDS):
            completion = await ctx.state.workers.run(completion_of, request)
            await submit_completion(ctx, completion, reduces_max_tokens=True)
        return await _respond(ctx, GenerationLines(ctx, request, OutputParser()), request)
    with renamed_fields({**FIELDS, "messages": "prompt"}):
        chat = await ctx.state.workers.run(_as_prompt_chat, ctx.model, request)
        prepared = await submit_chat(ctx, chat, reduces_max_tokens=True)
    _note_think(ctx, request, bool(chat.chat_template_kwargs or prepared.used_hints))
    return await _respond(ctx, GenerationLines(ctx, request, prepared.make_parser()), request)


def _loaded(request: OllamaRequest) -> dict[str, Any]:
    """The fields of the answer to a request without a prompt."""
    fields = {"done": True, "done_reason": "load"}
    return {"model": request.model, "created_at": timestamp(), **fields}


def _as_chat(model: Model, request: OllamaChatRequest) -> ChatRequest:
    return chat_of(TemplateFeatures.of(model.tokenizer), request)


def _as_prompt_chat(model: Model, request: OllamaGenerateRequest) -> ChatRequest:
    return prompt_chat_of(TemplateFeatures.of(model.tokenizer), request)


def _note_think(ctx: RequestContext, request: OllamaRequest, is_used: bool) -> None:
    if is_used:
        ctx.ignored.discard("think")
    ctx.constraint_field = FIELDS.get(ctx.constraint_field, ctx.constraint_field)


async def _respond(ctx: RequestContext, reply: Reply, request: OllamaRequest) -> Response:
    return await respond(ctx, reply, stream=request.stream is not False)


CHAT = Post(
    path="/api/chat",
    request=OllamaChatRequest,
    response=OllamaChat,
    chunk=OllamaChat,
    handle=ollama_chat,
    error=OllamaError,
    is_ndjson=True,
)
GENERATE = Post(
    path="/api/generate",
    request=OllamaGenerateRequest,
    response=OllamaGeneration,
    chunk=OllamaGeneration,
    handle=ollama_generate,
    error=OllamaError,
    is_ndjson=True,
)


class _Gain:
    """What an answer, or a line of it, contains."""

    def __init__(self) -> None:
        self.content = ""
        self.thinking = ""
        self.calls: list[ToolCallOutput] = []
        self.logprobs: list[TokenLogprob] = []

    @property
    def is_empty(self) -> bool:
        return not (self.content or self.thinking or self.calls or self.logprobs)

    def extend(self, other: "_Gain") -> None:
        self.content += other.content
        self.thinking += other.thinking
        self.calls += other.calls
        self.logprobs += other.logprobs


class _Lines(Reply):
    """Collects the answer to `request`; a call is sent when its arguments are complete."""

    ping: ClassVar[bytes] = b""
    media_type: ClassVar[str] = "application/x-ndjson"

    def __init__(self, ctx: RequestContext, request: OllamaRequest, parser: OutputParser) -> None:
        super().__init__(ctx, id_prefix="")
        self._request = request
        self._parser = parser
        self._answer = _Gain()
        self._call: ToolCallStart | None = None
        self._arguments = ""
        self._reason = "stop"

    def add(self, number: int, delta: CompletionDelta) -> Iterable[bytes]:
        gain = _Gain()
        gain.logprobs += delta.logprobs
        parts = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            parts += self._parser.finish()
            self._reason = "length" if delta.finish_reason == "length" else "stop"
        for part in parts:
            self._take(part, gain)
        if delta.finish_reason is not None:
            self._end_call(gain)
        self._answer.extend(gain)
        return [] if gain.is_empty else [_line(self._reply(gain))]

    def opening(self) -> Iterable[bytes]:
        return ()

    def closing(self) -> Iterable[bytes]:
        yield _line(self._reply(_Gain(), **self._end()))

    def failure(self, status: int, message: str, param: str | None, code: str | None) -> bytes:
        _, body = ollama_error(status, message, param, code)
        return _line(OllamaError.model_validate(body))

    def response(self) -> OllamaReply:
        return self._reply(self._answer, **self._end())

    def _take(self, part: Part, gain: _Gain) -> None:
        match part:
            case ContentPart():
                gain.content += part.text
            case ReasoningPart():
                gain.thinking += part.text
            case ToolCallStart():
                self._end_call(gain)
                self._call = part
            case ToolCallArguments():
                self._arguments += part.text

    def _end_call(self, gain: _Gain) -> None:
        if self._call is not None:
            function = FunctionOutput(
                index=self._call.index,
                name=self._call.name,
                arguments=parsed_arguments(self._arguments),
            )
            gain.calls.append(ToolCallOutput(id=self._call.id, function=function))
        self._call, self._arguments = None, ""

    def _end(self) -> dict[str, Any]:
        """The fields of the last line."""
        ctx = self._ctx
        return {
            "done": True,
            "done_reason": self._reason,
            "total_duration": _nanoseconds(ctx.seconds),
            "load_duration": 0,
            "prompt_eval_count": ctx.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(ctx.prefill_seconds),
            "eval_count": ctx.num_tokens,
            "eval_duration": _nanoseconds(ctx.decode_seconds),
        }

    def _shared(self, gain: _Gain) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "model": self._request.model,
            "created_at": timestamp(),
            "done": False,
        }
        if gain.logprobs:
            tokenizer = self._ctx.model.tokenizer
            fields["logprobs"] = [chat_logprob(tokenizer, entry) for entry in gain.logprobs]
        return fields

    def _reply(self, gain: _Gain, **end: Any) -> OllamaReply:
        raise NotImplementedError


class ChatLines(_Lines):
    """The answer as a message."""

    def _reply(self, gain: _Gain, **end: Any) -> OllamaChat:
        message = MessageOutput(
            content=gain.content,
            thinking=gain.thinking or None,
            tool_calls=gain.calls or None,
        )
        return OllamaChat(**{**self._shared(gain), "message": message, **end})


class GenerationLines(_Lines):
    """The answer as a text."""

    def _reply(self, gain: _Gain, **end: Any) -> OllamaGeneration:
        fields = {"response": gain.content, "thinking": gain.thinking or None}
        return OllamaGeneration(**{**self._shared(gain), **fields, **end})


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _line(model: BaseModel) -> bytes:
    return f"{model.model_dump_json()}\n".encode()
