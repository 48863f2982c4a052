"""Table of API operations: the modules of this package define the POSTs.

`serve.app` builds the routes from it, `routes.openapi` the OpenAPI document.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from lowlat.serve.protocol.errors import ErrorResponse
from lowlat.serve.routes.anthropic import COUNT_TOKENS, MESSAGES
from lowlat.serve.routes.chat import CHAT
from lowlat.serve.routes.completions import COMPLETIONS
from lowlat.serve.routes.embeddings import EMBEDDINGS, OLLAMA_EMBED
from lowlat.serve.routes.models import ModelCard, ModelList, Status, Version
from lowlat.serve.routes.ollama import CHAT as OLLAMA_CHAT
from lowlat.serve.routes.ollama import GENERATE as OLLAMA_GENERATE
from lowlat.serve.routes.ollama_models import (
    SHOW as OLLAMA_SHOW,
)
from lowlat.serve.routes.ollama_models import (
    OllamaError,
    OllamaModels,
    RunningModels,
)
from lowlat.serve.routes.responses import RESPONSES, ResponseObject
from lowlat.serve.routes.stored_responses import DeletedResponse, InputItemList, PageQuery
from lowlat.serve.routes.tokens import DETOKENIZE, TOKENIZE


@dataclass(frozen=True, kw_only=True, slots=True)
class Get:
    """An operation without a body; `response` None: text."""

    path: str
    summary: str
    response: type[BaseModel] | None
    parameter: str | None = None
    """Name of the path parameter."""
    error: type[BaseModel] = ErrorResponse
    values: Literal["models", "stored responses"] = "models"
    """What the path parameter names."""
    method: Literal["get", "delete"] = "get"
    query: type[BaseModel] | None = None
    """Model of the query parameters."""


POSTS = (
    CHAT,
    COMPLETIONS,
    RESPONSES,
    MESSAGES,
    COUNT_TOKENS,
    TOKENIZE,
    DETOKENIZE,
    OLLAMA_CHAT,
    OLLAMA_GENERATE,
    OLLAMA_SHOW,
    EMBEDDINGS,
    OLLAMA_EMBED,
)
GETS = (
    Get(path="/v1/models", summary="The served models.", response=ModelList),
    Get(
        path="/v1/models/{id}",
        summary="A served model.",
        response=ModelCard,
        parameter="id",
    ),
    Get(
        path="/api/tags",
        summary="The served models (Ollama).",
        response=OllamaModels,
        error=OllamaError,
    ),
    Get(
        path="/api/ps",
        summary="The models in memory (Ollama).",
        response=RunningModels,
        error=OllamaError,
    ),
    Get(
        path="/api/version",
        summary="The server's version (Ollama).",
        response=Version,
        error=OllamaError,
    ),
    Get(
        path="/v1/responses/{id}",
        summary="A stored response.",
        response=ResponseObject,
        parameter="id",
        values="stored responses",
    ),
    Get(
        path="/v1/responses/{id}",
        summary="Deletes a stored response.",
        response=DeletedResponse,
        parameter="id",
        values="stored responses",
        method="delete",
    ),
    Get(
        path="/v1/responses/{id}/input_items",
        summary="The input items of a stored response.",
        response=InputItemList,
        parameter="id",
        values="stored responses",
        query=PageQuery,
    ),
    Get(path="/health", summary="Liveness: whether an engine makes progress.", response=Status),
    Get(path="/ready", summary="Readiness: whether new requests are accepted.", response=Status),
    Get(path="/version", summary="The version of lowlat.", response=Version),
    Get(path="/metrics", summary="Metrics in Prometheus' text format.", response=None),
)
