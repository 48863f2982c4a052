"""Table of API operations: path, request and response models, handler.

`serve.app` builds the routes from it, `routes.openapi` the OpenAPI document.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from lowlat.serve.protocol.base import StrictModel
from lowlat.serve.protocol.chat import ChatRequest
from lowlat.serve.protocol.chat_response import ChatCompletion, ChatCompletionChunk
from lowlat.serve.protocol.completions import CompletionRequest, CompletionResponse
from lowlat.serve.protocol.models import ModelCard, ModelList, Status
from lowlat.serve.protocol.responses import ResponsesRequest
from lowlat.serve.protocol.responses_output import ResponseEvent, ResponseObject
from lowlat.serve.protocol.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from lowlat.serve.routes.chat import create_chat
from lowlat.serve.routes.completions import create_completion
from lowlat.serve.routes.context import RequestContext
from lowlat.serve.routes.responses import create_response
from lowlat.serve.routes.tokens import detokenize, tokenize

Handle = Callable[[RequestContext, Any], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Post:
    """An operation with a JSON body."""

    path: str
    request: type[StrictModel]
    response: type[BaseModel]
    chunk: type[BaseModel] | None = None
    """Model of a stream's events; None: the operation cannot stream."""
    handle: Handle


@dataclass(frozen=True, kw_only=True, slots=True)
class Get:
    """An operation without a body; `response` None: text."""

    path: str
    summary: str
    response: type[BaseModel] | None
    parameter: str | None = None
    """Name of the path parameter."""


POSTS = (
    Post(
        path="/v1/chat/completions",
        request=ChatRequest,
        response=ChatCompletion,
        chunk=ChatCompletionChunk,
        handle=create_chat,
    ),
    Post(
        path="/v1/completions",
        request=CompletionRequest,
        response=CompletionResponse,
        chunk=CompletionResponse,
        handle=create_completion,
    ),
    Post(
        path="/v1/responses",
        request=ResponsesRequest,
        response=ResponseObject,
        chunk=ResponseEvent,
        handle=create_response,
    ),
    Post(path="/tokenize", request=TokenizeRequest, response=TokenizeResponse, handle=tokenize),
    Post(
        path="/detokenize",
        request=DetokenizeRequest,
        response=DetokenizeResponse,
        handle=detokenize,
    ),
)
GETS = (
    Get(path="/v1/models", summary="The served model, in a list.", response=ModelList),
    Get(
        path="/v1/models/{id}",
        summary="The served model.",
        response=ModelCard,
        parameter="id",
    ),
    Get(path="/health", summary="Liveness: whether the engine makes progress.", response=Status),
    Get(path="/ready", summary="Readiness: whether new requests are accepted.", response=Status),
    Get(path="/metrics", summary="Metrics in Prometheus' text format.", response=None),
)
