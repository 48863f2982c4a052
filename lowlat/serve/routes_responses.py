"""POST /v1/responses, by way of the chat it means."""

from starlette.responses import Response

from lowlat.serve.call import Call
from lowlat.serve.endpoint import json_response
from lowlat.serve.protocol.responses import ResponsesRequest
from lowlat.serve.responses_chat import as_chat
from lowlat.serve.responses_reply import ResponsesReply
from lowlat.serve.routes_chat import submit_chat
from lowlat.serve.stream import stream_response


async def create_response(call: Call, request: ResponsesRequest) -> Response:
    """Answer `request`, streamed where it asks for that."""
    call.services.check_model(request.model)
    prepared = await submit_chat(call, as_chat(request))
    reply = ResponsesReply(call, request, prepared.make_parser())
    if request.stream:
        return stream_response(reply.events(), call.services.config)
    return json_response(await reply.whole())
