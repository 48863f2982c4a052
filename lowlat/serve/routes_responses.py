"""POST /v1/responses, by way of the chat it means.

Owns the names under which errors of the chat are told.
"""

from starlette.responses import Response

from lowlat.serve.call import Call
from lowlat.serve.endpoint import json_response
from lowlat.serve.naming import renamed
from lowlat.serve.protocol.responses import ResponsesRequest
from lowlat.serve.responses_chat import as_chat
from lowlat.serve.responses_reply import ResponsesReply
from lowlat.serve.routes_chat import submit_chat
from lowlat.serve.stream import stream_response

_FIELDS = {
    "messages": "input",
    "prompt": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    # The same field, whose functions have another form.
    "tools": "tools",
}
"""A chat's fields, and what they are in this API."""


async def create_response(call: Call, request: ResponsesRequest) -> Response:
    """Answer `request`, streamed where it asks for that."""
    call.services.check_model(request.model)
    with renamed(_FIELDS):
        chat = await call.services.workers.run(as_chat, request)
        prepared = await submit_chat(call, chat)
    call.form_field = _FIELDS.get(call.form_field, call.form_field)
    reply = ResponsesReply(call, request, prepared.make_parser())
    if request.stream:
        return stream_response(reply.events(), call.services.config)
    return json_response(await reply.whole())
