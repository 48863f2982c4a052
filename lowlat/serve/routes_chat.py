"""POST /v1/chat/completions.

Owns the order of the steps: prompt and grammar off the event loop, admission, reply.
"""

from contextlib import AbstractContextManager

from starlette.responses import Response

from lowlat.serve.call import Call
from lowlat.serve.chat import PreparedChat, prepare_chat
from lowlat.serve.chat_reply import ChatReply
from lowlat.serve.endpoint import json_response
from lowlat.serve.naming import renamed
from lowlat.serve.protocol.chat import ChatRequest
from lowlat.serve.stream import stream_response


async def create_chat(call: Call, request: ChatRequest) -> Response:
    """Answer `request`, streamed where it asks for that."""
    call.services.check_model(request.model)
    prepared = await submit_chat(call, request)
    reply = ChatReply(call, request, prepared.make_parser)
    if request.stream:
        return stream_response(reply.events(), call.services.config)
    return json_response(await reply.whole())


async def submit_chat(call: Call, request: ChatRequest) -> PreparedChat:
    """Have the chat's next answer generated; returns how to read it."""
    services = call.services
    prepared = await services.workers.run(prepare_chat, services.model, request)
    grammar = None
    if prepared.structured is not None:
        param = call.form_field = request.form_field
        with _limits_named(request):
            services.engine.check(prepared.ids, prepared.params)
        grammar = await call.compile(prepared.structured, param=param)
    with _limits_named(request):
        await call.submit(
            prepared.ids,
            prepared.params,
            priority=request.priority,
            deadline=request.deadline_seconds,
            grammar=grammar,
            keep_special=prepared.keep_special,
        )
    return prepared


def _limits_named(request: ChatRequest) -> AbstractContextManager[None]:
    """The engine knows one limit of an answer, chats have two names for it."""
    is_new = request.max_tokens is None
    return renamed({"max_tokens": "max_completion_tokens"} if is_new else {})
