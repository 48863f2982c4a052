"""POST /v1/chat/completions: prepare the prompt, submit it, build the response or its SSE chunks.

Prompt and grammar are prepared off the event loop. `chat.output_parser` splits the output into
content, reasoning and tool calls.
"""

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager, aclosing

from starlette.responses import Response

from lowlat.generate import completion
from lowlat.generate.completion import CompletionDelta
from lowlat.serve.chat.output_parser import OutputParser
from lowlat.serve.chat.prompt import PreparedChat, prepare_chat
from lowlat.serve.http.errors import renamed_fields
from lowlat.serve.http.sse import DONE, event, stream_response
from lowlat.serve.protocol import chat_response as wire
from lowlat.serve.protocol.chat import ChatRequest
from lowlat.serve.routes.context import RequestContext
from lowlat.serve.routes.endpoint import json_response
from lowlat.serve.routes.response_fields import chat_logprobs, new_id, now, timings_of, usage_of
from lowlat.serve.tool_parsers.parts import (
    ContentPart,
    Part,
    ReasoningPart,
    ToolCallArguments,
    ToolCallStart,
)
from lowlat.text.tokenizer import Tokenizer


async def create_chat(ctx: RequestContext, request: ChatRequest) -> Response:
    """Complete a chat, streamed if the request asks for it."""
    ctx.state.check_model(request.model)
    prepared = await submit_chat(ctx, request)
    reply = ChatResponseBuilder(ctx, request, prepared.make_parser)
    if request.stream:
        return stream_response(reply.events(), ctx.state.config)
    return json_response(await reply.complete())


async def submit_chat(ctx: RequestContext, request: ChatRequest) -> PreparedChat:
    """Submit the chat to the engine; returns the prepared request with its parser."""
    state = ctx.state
    prepared = await state.workers.run(prepare_chat, state.model, request)
    grammar = None
    if prepared.structured is not None:
        param = ctx.constraint_field = request.constraint_field
        with _renamed_max_tokens(request):
            state.engine.check(prepared.ids, prepared.params)
        grammar = await ctx.compile(prepared.structured, param=param)
    with _renamed_max_tokens(request):
        await ctx.submit(
            prepared.ids,
            prepared.params,
            priority=request.priority,
            deadline=request.deadline_seconds,
            grammar=grammar,
            keep_special=prepared.keep_special,
        )
    return prepared


def _renamed_max_tokens(request: ChatRequest) -> AbstractContextManager[None]:
    """The engine has one name for max_tokens, chats have two."""
    is_new = request.max_tokens is None
    return renamed_fields({"max_tokens": "max_completion_tokens"} if is_new else {})


class _Choice:
    """One completion of the chat so far."""

    def __init__(self, parser: OutputParser) -> None:
        self.parser = parser
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: dict[int, tuple[ToolCallStart, list[str]]] = {}
        self.logprobs: list[completion.TokenLogprob] = []
        self.finish_reason: wire.ChatFinishReason | None = None
        self.has_begun = False

    def push(self, delta: CompletionDelta) -> list[Part]:
        """Parse `delta`; returns the parts that are now certain."""
        parts = self.parser.push(delta.text)
        if delta.finish_reason is not None:
            parts = [*parts, *self.parser.finish()]
            self.finish_reason = "length" if delta.finish_reason == "length" else "stop"
            if self.parser.has_tool_calls and self.finish_reason == "stop":
                self.finish_reason = "tool_calls"
        return parts

    def collect(self, delta: CompletionDelta, parts: list[Part]) -> None:
        """Collect `parts` and log-probabilities for the complete message."""
        self.logprobs.extend(delta.logprobs)
        for part in parts:
            match part:
                case ContentPart():
                    self.content.append(part.text)
                case ReasoningPart():
                    self.reasoning.append(part.text)
                case ToolCallStart():
                    self.calls[part.index] = (part, [])
                case ToolCallArguments():
                    self.calls[part.index][1].append(part.text)

    def message(self) -> wire.ChatMessage:
        calls = [
            wire.ChatToolCall(
                id=start.id,
                function=wire.ChatFunctionCall(name=start.name, arguments="".join(arguments)),
            )
            for _, (start, arguments) in sorted(self.calls.items())
        ]
        content = "".join(self.content)
        return wire.ChatMessage(
            content=content if content or not calls else None,
            reasoning_content="".join(self.reasoning) or None,
            tool_calls=calls or None,
        )


class ChatResponseBuilder:
    """Builds the response to `request` from the deltas of `ctx`."""

    def __init__(
        self, ctx: RequestContext, request: ChatRequest, make_parser: Callable[[], OutputParser]
    ) -> None:
        self._ctx = ctx
        self._request = request
        self._id = new_id("chatcmpl-")
        self._created = now()
        self._choices = [_Choice(make_parser()) for _ in range(request.n or 1)]

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._ctx.state.model.tokenizer

    async def complete(self) -> wire.ChatCompletion:
        """The complete response."""
        async with aclosing(self._ctx.deltas()) as deltas:
            async for _, delta in deltas:
                choice = self._choices[delta.index]
                choice.collect(delta, choice.push(delta))
        return wire.ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._request.model,
            choices=[self._complete_choice(i, choice) for i, choice in enumerate(self._choices)],
            usage=usage_of(self._ctx),
            lowlat=timings_of(self._ctx),
        )

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The response as SSE chunks."""
        async with aclosing(self._ctx.deltas()) as deltas:
            async for _, delta in deltas:
                chunks = [self._chunk([choice]) for choice in self._chunks(delta)]
                if chunks:
                    yield b"".join(event(chunk.model_dump_json()) for chunk in chunks)
        if self._request.includes_usage:
            last = self._chunk([])
            last.usage, last.lowlat = usage_of(self._ctx), timings_of(self._ctx)
            yield event(last.model_dump_json())
        yield DONE

    def _complete_choice(self, index: int, choice: _Choice) -> wire.ChatChoice:
        logprobs = chat_logprobs(self._tokenizer, choice.logprobs)
        return wire.ChatChoice(
            index=index,
            message=choice.message(),
            logprobs=logprobs if self._request.logprobs else None,
            finish_reason=choice.finish_reason or "stop",
        )

    def _chunk(self, choices: list[wire.ChunkChoice]) -> wire.ChatCompletionChunk:
        return wire.ChatCompletionChunk(
            id=self._id, created=self._created, model=self._request.model, choices=choices
        )

    def _chunks(self, delta: CompletionDelta) -> Iterator[wire.ChunkChoice]:
        """`delta` as choices of chunks: the role comes first, the finish reason last and alone."""
        choice = self._choices[delta.index]
        parts = choice.push(delta)
        if not choice.has_begun:
            choice.has_begun = True
            opening = wire.MessageDelta(role="assistant", content="")
            yield wire.ChunkChoice(index=delta.index, delta=opening)
        gains = [_delta_of(part) for part in parts]
        logprobs = None
        if delta.logprobs:
            logprobs = chat_logprobs(self._tokenizer, delta.logprobs)
            gains = gains or [wire.MessageDelta(content="")]
        for gain in gains:
            yield wire.ChunkChoice(index=delta.index, delta=gain, logprobs=logprobs)
            logprobs = None
        if choice.finish_reason is not None:
            yield wire.ChunkChoice(
                index=delta.index, delta=wire.MessageDelta(), finish_reason=choice.finish_reason
            )


def _delta_of(part: Part) -> wire.MessageDelta:
    match part:
        case ContentPart():
            return wire.MessageDelta(content=part.text)
        case ReasoningPart():
            return wire.MessageDelta(reasoning_content=part.text)
        case ToolCallStart():
            tool_call = wire.ToolCallDelta(
                index=part.index,
                id=part.id,
                type="function",
                function=wire.FunctionDelta(name=part.name, arguments=""),
            )
        case ToolCallArguments():
            tool_call = wire.ToolCallDelta(
                index=part.index, function=wire.FunctionDelta(arguments=part.text)
            )
    return wire.MessageDelta(tool_calls=[tool_call])
