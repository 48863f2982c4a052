"""POST /v1/chat/completions: response models, prompt preparation, the reply and its SSE chunks.

Prompt and grammar are prepared off the event loop. `chat.output_parser` splits the output into
content, reasoning and tool calls.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Literal

from pydantic import Field
from starlette.responses import Response

from lowlat.generate.completion import CompletionDelta, TokenLogprob
from lowlat.serve.chat.output_parser import OutputParser
from lowlat.serve.chat.prompt import PreparedChat, TextConstraints, prepare_chat
from lowlat.serve.http.errors import renamed_fields
from lowlat.serve.http.sse import DONE, error_event, event
from lowlat.serve.protocol.base import WireModel, is_none
from lowlat.serve.protocol.chat import ChatRequest
from lowlat.serve.routes.context import RequestContext
from lowlat.serve.routes.endpoint import Post
from lowlat.serve.routes.prompt_logprobs import PromptLogprobs, check_size, prompt_logprobs
from lowlat.serve.routes.reply import (
    Reply,
    Timings,
    Usage,
    finish_reason,
    respond,
    timings_of,
    usage_of,
)
from lowlat.serve.tool_parsers.state import (
    ContentPart,
    Part,
    ReasoningPart,
    ToolCallArguments,
    ToolCallStart,
)
from lowlat.text.tokenizer import Tokenizer

ChatFinishReason = Literal["stop", "length", "tool_calls"]
"""stop: end of sequence or a stop string; length: max_tokens or the end of the context."""


class TopLogprob(WireModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(WireModel):
    token: str
    """The token's text, with U+FFFD for incomplete characters; `bytes` is exact."""
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(WireModel):
    """Log-probabilities before penalties, logit bias, temperature and filters."""

    content: list[ChatLogprob]
    refusal: None = None


class ChatFunctionCall(WireModel):
    name: str
    arguments: str
    """JSON text, as the model wrote it."""


class ChatToolCall(WireModel):
    id: str
    type: Literal["function"] = "function"
    function: ChatFunctionCall


class ChatMessage(WireModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = Field(default=None, exclude_if=is_none)
    tool_calls: list[ChatToolCall] | None = Field(default=None, exclude_if=is_none)


class ChatChoice(WireModel):
    index: int
    message: ChatMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: ChatFinishReason
    token_ids: list[int] | None = Field(default=None, exclude_if=is_none)
    """With return_token_ids: all generated tokens."""


class ChatCompletion(WireModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Unix time in seconds."""
    model: str
    choices: list[ChatChoice]
    prompt_token_ids: list[int] | None = Field(default=None, exclude_if=is_none)
    """With return_token_ids."""
    usage: Usage
    lowlat: Timings
    prompt_logprobs: PromptLogprobs | None = Field(default=None, exclude_if=is_none)


class FunctionDelta(WireModel):
    name: str | None = Field(default=None, exclude_if=is_none)
    arguments: str | None = Field(default=None, exclude_if=is_none)


class ToolCallDelta(WireModel):
    """The first delta of a call has id, type and name; later ones extend the arguments."""

    index: int
    id: str | None = Field(default=None, exclude_if=is_none)
    type: Literal["function"] | None = Field(default=None, exclude_if=is_none)
    function: FunctionDelta


class MessageDelta(WireModel):
    """Increment of a message."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=is_none)
    content: str | None = Field(default=None, exclude_if=is_none)
    reasoning_content: str | None = Field(default=None, exclude_if=is_none)
    tool_calls: list[ToolCallDelta] | None = Field(default=None, exclude_if=is_none)


class ChunkChoice(WireModel):
    index: int
    delta: MessageDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    token_ids: list[int] | None = Field(default=None, exclude_if=is_none)
    """With return_token_ids: the tokens since the choice's last chunk that has them."""


class ChatCompletionChunk(WireModel):
    """One chunk of a stream. With include_usage, the last has usage and no choices."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    prompt_token_ids: list[int] | None = Field(default=None, exclude_if=is_none)
    """With return_token_ids, in the first chunk of a choice."""
    usage: Usage | None = Field(default=None, exclude_if=is_none)
    lowlat: Timings | None = Field(default=None, exclude_if=is_none)


async def create_chat(ctx: RequestContext, request: ChatRequest) -> Response:
    """Complete a chat, streamed if the request asks for it."""
    prepared = await submit_chat(ctx, request)
    reply = ChatReply(ctx, request, prepared.make_parser)
    return await respond(ctx, reply, stream=request.stream)


CHAT = Post(
    path="/v1/chat/completions",
    request=ChatRequest,
    response=ChatCompletion,
    chunk=ChatCompletionChunk,
    handle=create_chat,
)


async def submit_chat(
    ctx: RequestContext,
    request: ChatRequest,
    texts: TextConstraints | None = None,
    *,
    reduces_max_tokens: bool = False,
) -> PreparedChat:
    """Submit the chat to the engine; returns the prepared request with its parser.

    texts: see prepare_chat. reduces_max_tokens: whether max_tokens may exceed the context, and ends
    there then.
    """
    prepared = await ctx.state.workers.run(prepare_chat, ctx.model, request, texts)
    if reduces_max_tokens:
        prepared = prepared.with_max_tokens_up_to(ctx.model.context)
    ctx.ignored -= prepared.used_hints
    if request.prompt_logprobs is not None:
        field = "prompt_logprobs"
        check_size([prepared.ids], request.prompt_logprobs, n=1, param=field)
    grammar = None
    if prepared.structured is not None:
        with _renamed_max_tokens(request):
            ctx.engine.check(prepared.ids, prepared.params)
        grammar = await ctx.compile(prepared.structured, param=request.constraint_field)
    with _renamed_max_tokens(request):
        await ctx.submit(
            prepared.ids,
            prepared.params,
            grammar=grammar,
            prompt_logprobs=request.prompt_logprobs,
            keep_special=prepared.keep_special,
            begins_text=prepared.begins_text,
        )
    return prepared


def _renamed_max_tokens(request: ChatRequest) -> AbstractContextManager[None]:
    """The engine has one name for max_tokens, chats have two."""
    is_new = request.max_tokens is None
    return renamed_fields({"max_tokens": "max_completion_tokens"} if is_new else {})


class _Choice:
    def __init__(self, parser: OutputParser) -> None:
        self.parser = parser
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[ChatToolCall] = []
        self.logprobs: list[TokenLogprob] = []
        self.tokens: list[int] = []
        self.finish_reason: ChatFinishReason | None = None
        self.has_begun = False

    def add(self, delta: CompletionDelta) -> list[Part]:
        """Parse and collect `delta`; returns the parts that are now certain."""
        parts = self.parser.push(delta.text)
        self.logprobs.extend(delta.logprobs)
        self.tokens.extend(delta.tokens)
        self.finish_reason = finish_reason(delta)
        if self.finish_reason is not None:
            parts += self.parser.finish()
            if self.parser.has_tool_calls and self.finish_reason == "stop":
                self.finish_reason = "tool_calls"
        for part in parts:
            match part:
                case ContentPart():
                    self.content.append(part.text)
                case ReasoningPart():
                    self.reasoning.append(part.text)
                case ToolCallStart():
                    function = ChatFunctionCall(name=part.name, arguments="")
                    self.calls.append(ChatToolCall(id=part.id, function=function))
                case ToolCallArguments():
                    self.calls[part.index].function.arguments += part.text
        return parts

    def message(self) -> ChatMessage:
        content = "".join(self.content)
        return ChatMessage(
            content=content if content or not self.calls else None,
            reasoning_content="".join(self.reasoning) or None,
            tool_calls=self.calls or None,
        )


class ChatReply(Reply):
    def __init__(
        self, ctx: RequestContext, request: ChatRequest, make_parser: Callable[[], OutputParser]
    ) -> None:
        super().__init__(ctx, id_prefix="chatcmpl-")
        self._request = request
        self._choices = [_Choice(make_parser()) for _ in range(request.n or 1)]

    def response(self) -> ChatCompletion:
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._request.model,
            choices=[
                ChatChoice(
                    index=index,
                    message=choice.message(),
                    logprobs=self._logprobs(choice.logprobs) if self._request.logprobs else None,
                    finish_reason=choice.finish_reason or "stop",
                    token_ids=choice.tokens if self._request.return_token_ids else None,
                )
                for index, choice in enumerate(self._choices)
            ],
            prompt_token_ids=self._prompt_ids(),
            usage=usage_of(self._ctx),
            lowlat=timings_of(self._ctx),
            prompt_logprobs=self._prompt_logprobs(),
        )

    def _prompt_logprobs(self) -> PromptLogprobs | None:
        top = self._request.prompt_logprobs
        if top is None:
            return None
        tokenizer = self._ctx.model.tokenizer
        return prompt_logprobs(tokenizer, self._ctx.prompt_logprobs(0), top=top)

    def _prompt_ids(self) -> list[int] | None:
        return list(self._ctx.prompt(0)) if self._request.return_token_ids else None

    def add(self, number: int, delta: CompletionDelta) -> Iterable[bytes]:
        choice = self._choices[delta.index]
        return self._events(choice, delta, choice.add(delta))

    def _events(
        self, choice: _Choice, delta: CompletionDelta, parts: list[Part]
    ) -> Iterator[bytes]:
        prompt_ids = None if choice.has_begun else self._prompt_ids()
        for chunk_choice in self._chunks(choice, delta, parts):
            chunk = self._chunk([chunk_choice])
            chunk.prompt_token_ids, prompt_ids = prompt_ids, None
            yield self._event(chunk)

    def opening(self) -> Iterable[bytes]:
        return ()

    def closing(self) -> Iterable[bytes]:
        if self._request.includes_usage:
            last = self._chunk([])
            last.usage, last.lowlat = usage_of(self._ctx), timings_of(self._ctx)
            yield self._event(last)
        yield DONE

    def failure(self, status: int, message: str, param: str | None, code: str | None) -> bytes:
        return error_event(status, message, param, code)

    def _chunk(self, choices: list[ChunkChoice]) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._id, created=self._created, model=self._request.model, choices=choices
        )

    def _event(self, chunk: ChatCompletionChunk) -> bytes:
        return event(chunk.model_dump_json())

    def _chunks(
        self, choice: _Choice, delta: CompletionDelta, parts: list[Part]
    ) -> Iterator[ChunkChoice]:
        """`delta` as choices of chunks: the role comes first, the finish reason last and alone."""
        if not choice.has_begun:
            choice.has_begun = True
            opening = MessageDelta(role="assistant", content="")
            yield ChunkChoice(index=delta.index, delta=opening)
        gains = [_delta_of(part) for part in parts]
        logprobs = None
        if delta.logprobs:
            logprobs = self._logprobs(delta.logprobs)
        ids = list(delta.tokens) if self._request.return_token_ids and delta.tokens else None
        if logprobs is not None or ids is not None:
            gains = gains or [MessageDelta(content="")]
        for gain in gains:
            yield ChunkChoice(index=delta.index, delta=gain, logprobs=logprobs, token_ids=ids)
            logprobs = ids = None
        if choice.finish_reason is not None:
            yield ChunkChoice(
                index=delta.index, delta=MessageDelta(), finish_reason=choice.finish_reason
            )

    def _logprobs(self, entries: Iterable[TokenLogprob]) -> ChoiceLogprobs:
        tokenizer = self._ctx.model.tokenizer
        return ChoiceLogprobs(content=[chat_logprob(tokenizer, entry) for entry in entries])


def _delta_of(part: Part) -> MessageDelta:
    match part:
        case ContentPart():
            return MessageDelta(content=part.text)
        case ReasoningPart():
            return MessageDelta(reasoning_content=part.text)
        case ToolCallStart():
            tool_call = ToolCallDelta(
                index=part.index,
                id=part.id,
                type="function",
                function=FunctionDelta(name=part.name, arguments=""),
            )
        case ToolCallArguments():
            tool_call = ToolCallDelta(index=part.index, function=FunctionDelta(arguments=part.text))
    return MessageDelta(tool_calls=[tool_call])


def chat_logprob(tokenizer: Tokenizer, entry: TokenLogprob) -> ChatLogprob:
    data = tokenizer.id_to_bytes(entry.token)
    return ChatLogprob(
        token=_text(data),
        logprob=entry.logprob,
        bytes=list(data),
        top_logprobs=[_top_logprob(tokenizer, token, value) for token, value in entry.top],
    )


def _top_logprob(tokenizer: Tokenizer, token: int, logprob: float) -> TopLogprob:
    data = tokenizer.id_to_bytes(token)
    return TopLogprob(token=_text(data), logprob=logprob, bytes=list(data))


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
