"""POST /v1/completions: request and response models, the reply and its SSE chunks.

Tokens and grammars are prepared off the event loop. Either all prompts of a request are admitted or
none.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field
from starlette.responses import Response

from lowlat.engine.request import FinishReason
from lowlat.generate.completion import CompletionDelta, TokenLogprob
from lowlat.generate.grammar import CompiledGrammar
from lowlat.generate.model import Model
from lowlat.generate.params import SamplingParams
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.chat.prompt import encode_text
from lowlat.serve.http.sse import DONE, error_event, event
from lowlat.serve.protocol.base import WireModel, is_none
from lowlat.serve.protocol.completions import CompletionRequest
from lowlat.serve.protocol.errors import RequestError, about
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
from lowlat.text.fim_tokens import fim_tokens
from lowlat.text.tokenizer import Tokenizer


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
    prompt_token_ids: list[int] | None = Field(default=None, exclude_if=is_none)
    """With return_token_ids; in a stream only in the completion's first chunk."""
    token_ids: list[int] | None = Field(default=None, exclude_if=is_none)
    """With return_token_ids: all generated tokens, or those of the chunk."""


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

    def to_params(remaining: int) -> SamplingParams:
        return request.to_params(remaining, reduces_max_tokens=reduces_max_tokens)

    prompts = await ctx.state.workers.run(_encode, ctx.engine, request, to_params)
    params = [to_params(ctx.model.context - len(ids)) for ids, _ in prompts]
    # After a prompt without text, the output begins a text.
    begin = [not ctx.model.tokenizer.has_text(ids) for ids, _ in prompts]
    grammars = await _grammars(ctx, request, set(begin))
    if len(prompts) > 1:
        # All or none: otherwise started completions would be discarded.
        ctx.engine.check_room(len(prompts) - 1)
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
    param = next(iter(request.guided_fields), "")
    with about(param):
        output = request.guided_output()
    if output is None:
        return {}
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
    encoded = [
        _ids(model, prompt, request.suffix) if isinstance(prompt, str) else prompt
        for prompt in prompts
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


def _ids(model: Model, prompt: str, suffix: str | None) -> list[int]:
    """A prompt's token ids; with `suffix` for fill-in-the-middle: prefix, suffix, middle."""
    if suffix is None:
        return encode_text(model, prompt, "prompt")
    marks = fim_tokens(model.tokenizer)
    if marks is None:
        raise RequestError(
            "suffix: this model has no fill-in-the-middle tokens such as <|fim_prefix|>; leave it"
            " out",
            param="suffix",
        )
    before, after = (
        encode_text(model, text, param, add_special_tokens=False, parse_special=False)
        for text, param in ((prompt, "prompt"), (suffix, "suffix"))
    )
    begin = model.tokenizer.encode("")
    return [*begin, marks.prefix, *before, marks.suffix, *after, marks.middle]


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
        self._tokens: list[list[int]] = [[] for _ in range(count)]
        self._entries: list[list[TokenLogprob]] = [[] for _ in range(count)]
        self._reasons: list[Literal["stop", "length"] | None] = [None] * count

    def add(self, number: int, delta: CompletionDelta) -> Iterable[bytes]:
        index = number * self._n + delta.index
        if not self._request.generates:
            # The engine samples one token all the same, which is dropped and not counted.
            self._ctx.num_tokens = 0
            delta = replace(delta, text="", tokens=(), logprobs=(), finish_reason=_length(delta))
        is_first = not self._texts[index]
        text = self._echoes[number] + delta.text if is_first else delta.text
        self._texts[index].append(text)
        self._tokens[index].extend(delta.tokens)
        self._entries[index].extend(delta.logprobs)
        self._reasons[index] = finish_reason(delta)
        return self._events(index, text, delta, is_first=is_first)

    def response(self) -> CompletionResponse:
        each = zip(self._texts, self._entries, self._reasons, self._tokens, strict=True)
        choices = [
            self._choice(index, "".join(texts), entries, reason, tokens)
            for index, (texts, entries, reason, tokens) in enumerate(each)
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

    def _events(
        self, index: int, text: str, delta: CompletionDelta, *, is_first: bool
    ) -> Iterator[bytes]:
        has_ids = self._request.return_token_ids and delta.tokens
        if text or delta.logprobs or delta.finish_reason or has_ids:
            reason = finish_reason(delta)
            choice = self._choice(index, text, delta.logprobs, reason, delta.tokens)
            if not is_first:
                choice.prompt_token_ids = None
            yield event(self._response([choice]).model_dump_json())

    def _choice(
        self,
        index: int,
        text: str,
        entries: Sequence[TokenLogprob],
        reason: Literal["stop", "length"] | None,
        tokens: Sequence[int],
    ) -> CompletionChoice:
        has_ids = self._request.return_token_ids
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=self._logprobs(index, entries),
            finish_reason=reason,
            prompt_logprobs=self._prompt_logprobs(index),
            prompt_token_ids=list(self._ctx.prompt(index // self._n)) if has_ids else None,
            token_ids=list(tokens) if has_ids else None,
        )

    def _prompt_logprobs(self, index: int) -> PromptLogprobs | None:
        if self._request.prompt_logprobs is None:
            return None
        entries = self._ctx.prompt_logprobs(index // self._n)
        return prompt_logprobs(
            self._ctx.model.tokenizer, entries, top=self._request.prompt_logprobs
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
        tokenizer = self._ctx.model.tokenizer
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
        tokenizer, prompt = self._ctx.model.tokenizer, self._ctx.prompt(number)
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
