"""POST /v1/completions.

Owns the order of the steps: tokens and grammar off the event loop, admission of every prompt,
reply.
"""

from starlette.responses import Response

from lowlat.generate.grammar import CompiledGrammar
from lowlat.generate.model import Model
from lowlat.generate.structured import StructuredOutput
from lowlat.serve.call import Call
from lowlat.serve.completion_reply import CompletionReply
from lowlat.serve.endpoint import json_response
from lowlat.serve.forms import structured_output
from lowlat.serve.lengths import check_size
from lowlat.serve.protocol.completions import CompletionRequest
from lowlat.serve.protocol.failure import RequestError
from lowlat.serve.protocol.formats import StructuredOutputs
from lowlat.serve.stream import stream_response
from lowlat.utils.errors import UserError


async def create_completion(call: Call, request: CompletionRequest) -> Response:
    """Complete the prompts of `request`, streamed where it asks for that."""
    services = call.services
    services.check_model(request.model)
    _check_queue(request, services.engine.max_queue)
    prompts = await services.workers.run(_encode, services.model, request)
    params = [request.to_params(services.model.context - len(ids)) for ids, _ in prompts]
    for (ids, _), own in zip(prompts, params, strict=True):
        services.engine.check(ids, own)
    # A prompt without text is not continued: its answer is a text of its own.
    begin = [not services.model.tokenizer.has_text(ids) for ids, _ in prompts]
    grammars = await _grammars(call, request, set(begin))
    if len(prompts) > 1:
        # All of them or none: what has begun would be thrown away.
        services.engine.check_room(len(prompts) - 1)
    for (ids, _), own, begins_text in zip(prompts, params, begin, strict=True):
        await call.submit(
            ids,
            own,
            priority=request.priority,
            deadline=request.deadline_seconds,
            grammar=grammars.get(begins_text),
            begins_text=begins_text,
        )
    reply = CompletionReply(call, request, [echo for _, echo in prompts])
    if request.stream:
        return stream_response(reply.events(), services.config)
    return json_response(await reply.whole())


def _check_queue(request: CompletionRequest, max_queue: int) -> None:
    """Raises RequestError for prompts that no wait makes room for."""
    if len(request.prompts) > max_queue:
        raise RequestError(
            f"prompt: {len(request.prompts)} prompts are more than the {max_queue} requests that"
            " this server lets wait; send fewer at once",
            param="prompt",
        )


async def _grammars(
    call: Call, request: CompletionRequest, kinds: set[bool]
) -> dict[bool, CompiledGrammar]:
    """What the answers are held to, of those that begin a text and those that go on with one."""
    if request.structured_outputs is None:
        return {}
    output = _form(request.structured_outputs)
    return {
        begins_text: await call.compile(output, param="structured_outputs", begins_text=begins_text)
        for begins_text in kinds
    }


def _form(given: StructuredOutputs) -> StructuredOutput:
    """What the answers are held to. Raises RequestError above a limit."""
    try:
        return structured_output(given)
    except UserError as error:
        field = "structured_outputs"
        raise RequestError(f"{field}: {error}", param=field) from error


def _encode(model: Model, request: CompletionRequest) -> list[tuple[list[int], str]]:
    """Token ids of each prompt, and the text its answers begin with."""
    for prompt in request.prompts:
        if isinstance(prompt, str):
            check_size(model, [prompt], "prompt")
    return [
        (
            model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt,
            _echo(model, prompt) if request.echo else "",
        )
        for prompt in request.prompts
    ]


def _echo(model: Model, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)
