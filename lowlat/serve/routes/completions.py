"""POST /v1/completions: encode the prompts, submit them, build the response or its SSE chunks.

Tokens and grammars are prepared off the event loop. Either all prompts of a request are admitted or
none.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Literal

from starlette.responses import Response

from lowlat.generate import completion
from lowlat.generate.completion import CompletionDelta
from lowlat.generate.grammar import CompiledGrammar
from lowlat.generate.model import Model
from lowlat.generate.structured import StructuredOutput
from lowlat.serve.chat.prompt import check_text_size
from lowlat.serve.http.sse import DONE, event, stream_response
from lowlat.serve.protocol import completions as wire
from lowlat.serve.protocol.completions import CompletionRequest
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.structured_outputs import StructuredOutputs
from lowlat.serve.routes.context import RequestContext
from lowlat.serve.routes.endpoint import json_response
from lowlat.serve.routes.response_fields import new_id, now, timings_of, usage_of
from lowlat.serve.structured_outputs import from_structured_outputs
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError


async def create_completion(ctx: RequestContext, request: CompletionRequest) -> Response:
    """Complete one or more prompts, streamed if the request asks for it."""
    state = ctx.state
    state.check_model(request.model)
    _check_queue(request, state.engine.max_queue)
    prompts = await state.workers.run(_encode, state.model, request)
    params = [request.to_params(state.model.context - len(ids)) for ids, _ in prompts]
    for (ids, _), own in zip(prompts, params, strict=True):
        state.engine.check(ids, own)
    # After a prompt without text, the output begins a text.
    begin = [not state.model.tokenizer.has_text(ids) for ids, _ in prompts]
    grammars = await _grammars(ctx, request, set(begin))
    if len(prompts) > 1:
        # All or none: otherwise started completions would be discarded.
        state.engine.check_room(len(prompts) - 1)
    for (ids, _), own, begins_text in zip(prompts, params, begin, strict=True):
        await ctx.submit(
            ids,
            own,
            priority=request.priority,
            deadline=request.deadline_seconds,
            grammar=grammars.get(begins_text),
            begins_text=begins_text,
        )
    reply = CompletionResponseBuilder(ctx, request, [echo for _, echo in prompts])
    if request.stream:
        return stream_response(reply.events(), state.config)
    return json_response(await reply.complete())


def _check_queue(request: CompletionRequest, max_queue: int) -> None:
    """Raise RequestError for more prompts than the queue can ever hold."""
    if len(request.prompts) > max_queue:
        raise RequestError(
            f"prompt: {len(request.prompts)} prompts exceed the queue of this server"
            f" ({max_queue}); send fewer per request",
            param="prompt",
        )


async def _grammars(
    ctx: RequestContext, request: CompletionRequest, kinds: set[bool]
) -> dict[bool, CompiledGrammar]:
    """The grammars of the outputs, by whether the output begins a text or continues one."""
    if request.structured_outputs is None:
        return {}
    output = _constraint(request.structured_outputs)
    return {
        begins_text: await ctx.compile(output, param="structured_outputs", begins_text=begins_text)
        for begins_text in kinds
    }


def _constraint(given: StructuredOutputs) -> StructuredOutput:
    """The constraint on the outputs. Raises RequestError above a limit."""
    try:
        return from_structured_outputs(given)
    except UserError as error:
        field = "structured_outputs"
        raise RequestError(f"{field}: {error}", param=field) from error


def _encode(model: Model, request: CompletionRequest) -> list[tuple[list[int], str]]:
    """Token ids of each prompt, and its text if the request sets echo."""
    for prompt in request.prompts:
        if isinstance(prompt, str):
            check_text_size(model, [prompt], "prompt")
    return [
        (
            model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt,
            _echo(model, prompt) if request.echo else "",
        )
        for prompt in request.prompts
    ]


def _echo(model: Model, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)


class CompletionResponseBuilder:
    """Builds the response to `request` from the deltas of `ctx`.

    `echoes`: for each prompt, the text that its completions start with.
    """

    def __init__(
        self, ctx: RequestContext, request: wire.CompletionRequest, echoes: Sequence[str]
    ) -> None:
        self._ctx = ctx
        self._request = request
        self._n = request.n or 1
        self._echoes = echoes
        self._id = new_id("cmpl-")
        self._created = now()

    async def complete(self) -> wire.CompletionResponse:
        """The complete response."""
        count = self._n * len(self._echoes)
        texts = [[self._echoes[index // self._n]] for index in range(count)]
        logprobs: list[list[completion.TokenLogprob]] = [[] for _ in range(count)]
        reasons: list[Literal["stop", "length"] | None] = [None] * count
        async with aclosing(self._ctx.deltas()) as deltas:
            async for number, delta in deltas:
                index = number * self._n + delta.index
                texts[index].append(delta.text)
                logprobs[index].extend(delta.logprobs)
                reasons[index] = _finish(delta)
        choices = [
            wire.CompletionChoice(
                index=index,
                text="".join(texts[index]),
                logprobs=self._logprobs(logprobs[index]),
                finish_reason=reasons[index],
            )
            for index in range(count)
        ]
        return self._response(choices, is_last=True)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The response as SSE chunks."""
        begun: set[int] = set()
        async with aclosing(self._ctx.deltas()) as deltas:
            async for number, delta in deltas:
                index = number * self._n + delta.index
                echo = "" if index in begun else self._echoes[number]
                begun.add(index)
                if not (echo or delta.text or delta.logprobs or delta.finish_reason):
                    continue
                choice = wire.CompletionChoice(
                    index=index,
                    text=echo + delta.text,
                    logprobs=self._logprobs(delta.logprobs),
                    finish_reason=_finish(delta),
                )
                yield event(self._response([choice]).model_dump_json())
        if self._request.includes_usage:
            yield event(self._response([], is_last=True).model_dump_json())
        yield DONE

    def _response(
        self, choices: list[wire.CompletionChoice], *, is_last: bool = False
    ) -> wire.CompletionResponse:
        return wire.CompletionResponse(
            id=self._id,
            created=self._created,
            model=self._request.model,
            choices=choices,
            usage=usage_of(self._ctx) if is_last else None,
            lowlat=timings_of(self._ctx) if is_last else None,
        )

    def _logprobs(self, entries: Sequence[completion.TokenLogprob]) -> wire.LegacyLogprobs | None:
        if self._request.logprobs is None:
            return None
        tokenizer = self._ctx.state.model.tokenizer
        return wire.LegacyLogprobs(
            tokens=[_token_text(tokenizer, entry.token) for entry in entries],
            token_logprobs=[entry.logprob for entry in entries],
            top_logprobs=[
                {_token_text(tokenizer, token): value for token, value in entry.top}
                for entry in entries
            ],
            text_offset=[entry.start for entry in entries],
        )


def _finish(delta: CompletionDelta) -> Literal["stop", "length"] | None:
    if delta.finish_reason is None:
        return None
    return "length" if delta.finish_reason == "length" else "stop"


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, or its bytes if they are not valid UTF-8, so that tokens stay distinct."""
    data = tokenizer.id_to_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
