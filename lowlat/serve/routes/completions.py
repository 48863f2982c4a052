"""POST /v1/completions: request and response models, the reply and its SSE chunks.

Tokens and grammars are prepared off the event loop. Either all prompts of a request are admitted or
none. Unsupported fields of OpenAI's API (suffix) are rejected by name.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from starlette.responses import Response

from lowlat.engine import params
from lowlat.engine.request import FinishReason
from lowlat.generate.completion import CompletionDelta, TokenLogprob
from lowlat.generate.grammar import CompiledGrammar
from lowlat.generate.model import Model
from lowlat.generate.params import SamplingParams
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.chat.prompt import check_text_size
from lowlat.serve.http.sse import DONE, error_event, event
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import TokenIds, WireModel, is_none
from lowlat.serve.protocol.errors import RequestError, about
from lowlat.serve.protocol.sampling import SamplingRequest, TopLogprobs
from lowlat.serve.protocol.structured_outputs import StructuredOutputs
from lowlat.serve.routes.context import RequestContext
from lowlat.serve.routes.endpoint import Post
from lowlat.serve.routes.prompt_logprobs import (
    PromptLogprobs,
    check_size,
    prompt_logprobs,
    text_offsets,
)
from lowlat.serve.routes.reply import (
    Reply,
    Timings,
    Usage,
    finish_reason,
    respond,
    timings_of,
    usage_of,
)
from lowlat.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
"""Default of OpenAI's API."""

Texts = Annotated[list[str], Field(min_length=1, max_length=limits.MAX_PROMPTS)]
IdLists = Annotated[list[TokenIds], Field(min_length=1, max_length=limits.MAX_PROMPTS)]
Prompt = str | Texts | TokenIds | IdLists


class CompletionRequest(SamplingRequest):
    """Prompts to complete, as text or token ids."""

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset({"suffix"})

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, le=params.MAX_TOKENS)] | None = None
    """Maximum number of generated tokens; default 16, or less at the end of the context. 0 only
    computes the prompt."""
    logprobs: TopLogprobs | None = None
    """Return each token's log-probability and those of this many of the most likely tokens."""
    echo: bool | None = None
    """Whether the returned text, and with logprobs its tokens, start with the prompt."""
    best_of: Annotated[int, Field(ge=1, le=params.MAX_N)] | None = None
    """Accepted only if equal to n."""
    structured_outputs: StructuredOutputs | None = None
    """Constraint on the output."""

    @model_validator(mode="after")
    def _check(self) -> "CompletionRequest":
        self.check_stream()
        if self.structured_outputs is not None:
            self.check_end()
        self.check_prompt_logprobs()
        if self.echo and self.stream and self.logprobs is not None:
            message = "echo with logprobs cannot be streamed; leave stream out"
            raise RequestError(message, param="echo")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError("best_of must equal n; leave it out", param="best_of")
        completions = len(self.prompts) * (self.n or 1)
        if completions > limits.MAX_PROMPTS:
            message = f"prompts times n exceed {limits.MAX_PROMPTS} completions; send fewer"
            raise RequestError(message, param="n")
        if self.logprobs is not None:
            self.check_logprobs(self.logprobs, completions=completions, param="logprobs")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        match self.prompt:
            case str():
                return [self.prompt]
            case [int(), *_]:
                return [[token for token in self.prompt if isinstance(token, int)]]
            case _:
                return [item for item in self.prompt if isinstance(item, str | list)]

    @property
    def generates(self) -> bool:
        """Whether the output has tokens."""
        return self.max_tokens != 0

    @property
    def scored(self) -> tuple[int, str] | None:
        """How many alternatives of each prompt token to compute, and the field that asks for it."""
        echoed = self.logprobs if self.echo else None
        if self.prompt_logprobs is None:
            return None if echoed is None else (echoed, "logprobs")
        return max(echoed or 0, self.prompt_logprobs), "prompt_logprobs"

    def to_params(self, remaining: int, *, reduces_max_tokens: bool = False) -> SamplingParams:
        """The engine's sampling params for a prompt with `remaining` context tokens after it."""
        limit = self.max_tokens or (DEFAULT_MAX_TOKENS if self.generates else 1)
        if reduces_max_tokens or self.max_tokens is None:
            limit = max(1, min(limit, remaining))
        return self.sampling_params(max_tokens=limit, logprobs=self.logprobs)


class LegacyLogprobs(WireModel):
    """One entry per token in every list."""

    tokens: list[str]
    """Text of each token; `bytes:\\xNN...` for an incomplete character."""
    token_logprobs: list[float | None]
    """Null for the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Number of characters of the text before each token."""


class CompletionChoice(WireModel):
    index: int
    """Index of the prompt times n, plus index of the completion."""
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    """In a stream null before the completion's last chunk."""
    prompt_logprobs: PromptLogprobs | None = Field(default=None, exclude_if=is_none)


class CompletionResponse(WireModel):
    """The complete response, and each chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Unix time in seconds."""
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = Field(default=None, exclude_if=is_none)
    """In a stream only in the last chunk, with include_usage."""
    lowlat: Timings | None = Field(default=None, exclude_if=is_none)


async def create_completion(ctx: RequestContext, request: CompletionRequest) -> Response:
    """Complete one or more prompts, streamed if the request asks for it."""
    reply = CompletionReply(ctx, request, await submit_completion(ctx, request))
    return await respond(ctx, reply, stream=request.stream)


async def submit_completion(
    ctx: RequestContext, request: CompletionRequest, *, reduces_max_tokens: bool = False
) -> list[str]:
    """Submit all prompts to the engine; returns the texts that their completions start with.

    reduces_max_tokens: whether max_tokens may exceed the context, and ends there then.
    """
    state = ctx.state

    def to_params(remaining: int) -> SamplingParams:
        return request.to_params(remaining, reduces_max_tokens=reduces_max_tokens)

    prompts = await state.workers.run(_encode, state.engine, request, to_params)
    params = [to_params(state.model.context - len(ids)) for ids, _ in prompts]
    # After a prompt without text, the output begins a text.
    begin = [not state.model.tokenizer.has_text(ids) for ids, _ in prompts]
    grammars = await _grammars(ctx, request, set(begin))
    if len(prompts) > 1:
        # All or none: otherwise started completions would be discarded.
        state.engine.check_room(len(prompts) - 1)
    for (ids, _), own, begins_text in zip(prompts, params, begin, strict=True):
        grammar = grammars.get(begins_text)
        await ctx.submit(
            ids,
            own,
            grammar=grammar,
            prompt_logprobs=None if request.scored is None else request.scored[0],
            begins_text=begins_text,
        )
    return [echo for _, echo in prompts]


COMPLETIONS = Post(
    path="/v1/completions",
    request=CompletionRequest,
    response=CompletionResponse,
    chunk=CompletionResponse,
    handle=create_completion,
)


async def _grammars(
    ctx: RequestContext, request: CompletionRequest, kinds: set[bool]
) -> dict[bool, CompiledGrammar]:
    """The grammars of the outputs, by whether the output begins a text or continues one."""
    if request.structured_outputs is None:
        return {}
    param = "structured_outputs"
    with about(param):
        output = request.structured_outputs.to_output()
    return {
        begins_text: await ctx.compile(output, param=param, begins_text=begins_text)
        for begins_text in kinds
    }


def _encode(
    engine: AsyncEngine, request: CompletionRequest, to_params: Callable[[int], SamplingParams]
) -> list[tuple[list[int], str]]:
    """Token ids of each prompt, and its text if the request sets echo. `to_params`: sampling params
    for a number of context tokens after the prompt.

    Prompts may have a million ids, so everything about all of them is done here, off the event
    loop. Raises RequestError and UserError for prompts that the engine cannot serve.
    """
    model, prompts = engine.model, request.prompts
    if len(prompts) > engine.max_queue:
        raise RequestError(
            f"prompt: {len(prompts)} prompts exceed the queue of this server ({engine.max_queue});"
            " send fewer per request",
            param="prompt",
        )
    for prompt in prompts:
        if isinstance(prompt, str):
            check_text_size(model, [prompt], "prompt")
    encoded = [
        model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts
    ]
    for ids in encoded:
        engine.check(ids, to_params(model.context - len(ids)))
    if request.scored is not None:
        top, field = request.scored
        check_size(encoded, top, n=request.n or 1, param=field)
    return [
        (ids, _echo(model, prompt) if request.echo else "")
        for ids, prompt in zip(encoded, prompts, strict=True)
    ]


def _echo(model: Model, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)


class CompletionReply(Reply):
    """Builds the response to `request` from the deltas of `ctx`.

    `echoes`: for each prompt, the text that its completions start with.
    """

    def __init__(
        self, ctx: RequestContext, request: CompletionRequest, echoes: Sequence[str]
    ) -> None:
        super().__init__(ctx, id_prefix="cmpl-")
        self._request = request
        self._n = request.n or 1
        self._echoes = echoes
        count = self._n * len(echoes)
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._entries: list[list[TokenLogprob]] = [[] for _ in range(count)]
        self._reasons: list[Literal["stop", "length"] | None] = [None] * count

    def add(self, number: int, delta: CompletionDelta) -> Iterable[bytes]:
        index = number * self._n + delta.index
        if not self._request.generates:
            # The engine samples one token all the same, which is dropped and not counted.
            self._ctx.num_tokens = 0
            delta = replace(delta, text="", logprobs=(), finish_reason=_length(delta))
        text = delta.text if self._texts[index] else self._echoes[number] + delta.text
        self._texts[index].append(text)
        self._entries[index].extend(delta.logprobs)
        self._reasons[index] = finish_reason(delta)
        return self._events(index, text, delta)

    def response(self) -> CompletionResponse:
        each = zip(self._texts, self._entries, self._reasons, strict=True)
        choices = [
            self._choice(index, "".join(texts), entries, reason)
            for index, (texts, entries, reason) in enumerate(each)
        ]
        return self._response(choices, is_last=True)

    def opening(self) -> Iterable[bytes]:
        return ()

    def closing(self) -> Iterable[bytes]:
        if self._request.includes_usage:
            yield event(self._response([], is_last=True).model_dump_json())
        yield DONE

    def failure(self, status: int, message: str, param: str | None, code: str | None) -> bytes:
        return error_event(status, message, param, code)

    def _events(self, index: int, text: str, delta: CompletionDelta) -> Iterator[bytes]:
        if text or delta.logprobs or delta.finish_reason:
            choice = self._choice(index, text, delta.logprobs, finish_reason(delta))
            yield event(self._response([choice]).model_dump_json())

    def _choice(
        self,
        index: int,
        text: str,
        entries: Sequence[TokenLogprob],
        reason: Literal["stop", "length"] | None,
    ) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=self._logprobs(index, entries),
            finish_reason=reason,
            prompt_logprobs=self._prompt_logprobs(index),
        )

    def _prompt_logprobs(self, index: int) -> PromptLogprobs | None:
        if self._request.prompt_logprobs is None:
            return None
        entries = self._ctx.prompt_logprobs(index // self._n)
        return prompt_logprobs(
            self._ctx.state.model.tokenizer, entries, top=self._request.prompt_logprobs
        )

    def _response(
        self, choices: list[CompletionChoice], *, is_last: bool = False
    ) -> CompletionResponse:
        return CompletionResponse(
            id=self._id,
            created=self._created,
            model=self._request.model,
            choices=choices,
            usage=usage_of(self._ctx) if is_last else None,
            lowlat=timings_of(self._ctx) if is_last else None,
        )

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> LegacyLogprobs | None:
        top = self._request.logprobs
        if top is None:
            return None
        tokenizer = self._ctx.state.model.tokenizer
        found = LegacyLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        start = 0
        if self._request.echo:
            start = len(self._echoes[index // self._n])
            self._add_prompt(found, index // self._n, top)
        for entry in entries:
            _add(found, tokenizer, entry.token, entry.logprob, entry.top, start + entry.start)
        return found

    def _add_prompt(self, found: LegacyLogprobs, number: int, top: int) -> None:
        """Add the tokens of an echoed prompt; its first token has no log-probability."""
        tokenizer, prompt = self._ctx.state.model.tokenizer, self._ctx.prompt(number)
        offsets = text_offsets(tokenizer, prompt, self._echoes[number])
        _add(found, tokenizer, prompt[0], None, None, offsets[0])
        entries = self._ctx.prompt_logprobs(number)
        for entry, offset in zip(entries, offsets[1:], strict=True):
            _add(found, tokenizer, entry.token, entry.logprob, entry.top[:top], offset)


def _add(
    found: LegacyLogprobs,
    tokenizer: Tokenizer,
    token: int,
    logprob: float | None,
    top: Iterable[tuple[int, float]] | None,
    offset: int,
) -> None:
    texts = None if top is None else {_token_text(tokenizer, other): value for other, value in top}
    found.tokens.append(_token_text(tokenizer, token))
    found.token_logprobs.append(logprob)
    found.top_logprobs.append(texts)
    found.text_offset.append(offset)


def _length(delta: CompletionDelta) -> FinishReason | None:
    """How a completion without output ends: also at an end-of-sequence token by its length."""
    return "length" if delta.finish_reason == "stop" else delta.finish_reason


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, or its bytes if they are not valid UTF-8, so that tokens stay distinct."""
    data = tokenizer.id_to_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
